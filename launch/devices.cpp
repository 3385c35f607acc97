#include "launch/devices.h"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "core/device/tf32.h"
#include "core/nn/matmul.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/rank_place.h"
#include "parallel/comm/staged.h"

namespace dattn {
namespace {

// NCCL takes no two ranks of one host on one device: each process says it is a host of its own, and they talk by loopback.
void pretend_hosts(int rank) {
  const std::string host = fmt::format("dattn-rank-{}", rank);
  const std::pair<const char*, const char*> settings[] = {
      {"NCCL_HOSTID", host.c_str()}, {"NCCL_NET", "Socket"},    {"NCCL_SOCKET_IFNAME", "lo"},
      {"NCCL_IB_DISABLE", "1"},      {"NCCL_P2P_DISABLE", "1"}, {"NCCL_SHM_DISABLE", "1"},
      {"NCCL_NVLS_ENABLE", "0"},     {"NCCL_MAX_CTAS", "2"},    {"NCCL_PROTO", "Simple"}};
  for (const auto& [name, value] : settings) ::setenv(name, value, 0);  // what the user set stays
}

bool shares_devices(const std::vector<RankPlace>& places) {
  std::set<std::pair<std::string, std::string>> taken;
  for (const RankPlace& place : places) taken.emplace(place.host, place.device);
  return taken.size() < places.size();
}

// Of the devices that the ranks of this host take.
void require_usable(const std::vector<CudaDevice>& devices, int needed) {
  for (int i = 0; i < needed; ++i) {
    const CudaDevice& device = devices[static_cast<std::size_t>(i)];
    if (device.unusable.empty()) continue;
    fail(ErrorCode::kSystem,
         "device=cuda: cuda:{} ({}) has {}, leave the device out with CUDA_VISIBLE_DEVICES, or set device=cpu", i, device.name,
         device.unusable);
  }
}

// On rank 0 alone: all chose alike.
void tell_transfers(int ranks, Transfers asked, Transfers taken, bool shared) {
  if (asked == Transfers::kAuto && taken == Transfers::kStaged && !shared && ranks > 1)
    return note_once("tensors travel between devices through host memory, slower than by NCCL: " + probe_nccl().detail,
                     LogLevel::kInfo);
  note_once(fmt::format("{} ranks on CUDA devices{}: tensors travel {}", ranks, shared ? ", some shared" : "",
                        taken == Transfers::kNccl ? "by NCCL" : "through host memory"));
}

}  // namespace

Device choose_device(const DeviceOptions& options, int local_rank, int local_size) {
  if (options.device == DeviceChoice::kCpu) return {};
  std::string why;
  const std::vector<CudaDevice>& devices = cuda_devices(why);
  const auto count = static_cast<int>(devices.size());
  const int needed = (local_size + options.ranks_per_device - 1) / options.ranks_per_device;
  if (options.device == DeviceChoice::kAuto && needed > count) {
    note_once(count == 0 ? "computing on the cpu: " + why
                         : fmt::format("computing on the cpu: {} ranks on this host, {} CUDA device(s)", local_size, count));
    return {};
  }
  const auto usable = [](const CudaDevice& device) { return device.unusable.empty(); };
  if (options.device == DeviceChoice::kAuto && !std::all_of(devices.begin(), devices.begin() + needed, usable)) {
    note_once("computing on the cpu: the CUDA devices cannot be used, `dattn doctor` says why");
    return {};
  }
  if (count == 0) fail(ErrorCode::kSystem, "device=cuda: {}; use device=cpu, or see `dattn doctor`", why);
  require(
      needed <= count,
      "device=cuda: {} ranks on this host, {} to a device, need {} CUDA devices; there are {}: start at most {} ranks, or set "
      "ranks_per_device={}",
      local_size, options.ranks_per_device, needed, count, count * options.ranks_per_device, (local_size + count - 1) / count);
  require_usable(devices, needed);
  return {DeviceKind::kCuda, static_cast<std::int8_t>(local_rank / options.ranks_per_device)};
}

std::unique_ptr<Communicator> device_world(std::unique_ptr<Communicator> control, const DeviceOptions& options,
                                           double timeout_s) {
  RankPlace mine = place_of_rank(options.transfers != Transfers::kStaged);
  if (!options.version.empty()) mine.version = options.version;
  if (!current_device().is_cuda()) mine.products = matmul_instructions();
  const std::vector<RankPlace> places = gather_alike(*control, mine);
  if (options.invariant) require_same_instructions(places);
  if (!current_device().is_cuda()) return control;
  const bool shared = shares_devices(places);
  Transfers transfers = options.transfers;
  if (transfers == Transfers::kAuto) transfers = shared || mine.nccl.empty() ? Transfers::kStaged : Transfers::kNccl;
  if (control->rank() == 0) tell_transfers(control->size(), options.transfers, transfers, shared);
  if (transfers == Transfers::kStaged) return staged(std::move(control));
  if (shared) pretend_hosts(control->rank());
  NcclOptions nccl = NcclOptions::from_environment(timeout_s);
  nccl.tuning = options.nccl;
  nccl.ordered_sums = options.ordered_sums;
  nccl.stuck = options.stuck;
  return nccl_world(std::move(control), nccl);
}

void run_on_device(const DeviceOptions& options, std::unique_ptr<Communicator> control, int local_rank, int local_size,
                   double timeout_s, const std::function<void(Communicator&)>& body) {
  const DeviceScope scope(choose_device(options, local_rank, local_size));
  allow_tf32(options.tf32);
  const auto world = device_world(std::move(control), options, timeout_s);
  body(*world);
  current_stream().synchronize();  // what is still under way may yet fail
}

void run_on_device(const DeviceOptions& options, Communicator& threads, double timeout_s,
                   const std::function<void(Communicator&)>& body) {
  run_on_device(options, whole_group(threads), threads.rank(), threads.size(), timeout_s, body);
}

}  // namespace dattn
