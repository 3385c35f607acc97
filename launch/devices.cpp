#include "launch/devices.h"

#include <cstdlib>
#include <set>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/host.h"
#include "core/base/log.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/staged.h"

namespace dattn {
namespace {

// What every rank says of itself: its host, so that ranks which share a device are seen, and its device.
std::string place_of(Device device) { return fmt::format("{}\n{}", host_name(), to_text(device)); }

// NCCL takes no two ranks of one host on one device: each process says it is a host of its own, and they talk by loopback.
void pretend_hosts(int rank) {
  const std::string host = fmt::format("dattn-rank-{}", rank);
  const std::pair<const char*, const char*> settings[] = {
      {"NCCL_HOSTID", host.c_str()}, {"NCCL_NET", "Socket"},    {"NCCL_SOCKET_IFNAME", "lo"},
      {"NCCL_IB_DISABLE", "1"},      {"NCCL_P2P_DISABLE", "1"}, {"NCCL_SHM_DISABLE", "1"},
      {"NCCL_NVLS_ENABLE", "0"},     {"NCCL_MAX_CTAS", "2"},    {"NCCL_PROTO", "Simple"}};
  for (const auto& [name, value] : settings) ::setenv(name, value, 0);  // what the user set stays
}

bool shares_devices(const std::vector<std::string>& places) {
  return std::set<std::string>(places.begin(), places.end()).size() < places.size();
}

void require_one_kind(const std::vector<std::string>& places, Device own) {
  const std::string kind = own.is_cuda() ? "\ncuda" : "\ncpu";
  for (std::size_t rank = 0; rank < places.size(); ++rank) {
    const std::size_t at = places[rank].find('\n');
    require(places[rank].compare(at, kind.size(), kind) == 0,
            "rank {} computes on {}, this one on {}; set device=cpu or device=cuda", rank, places[rank].substr(at + 1),
            to_text(own));
  }
}

}  // namespace

Device choose_device(const DeviceOptions& options, int local_rank, int local_size) {
  if (options.device == DeviceChoice::kCpu) return {};
  std::string why;
  const auto count = static_cast<int>(cuda_devices(why).size());
  const int needed = (local_size + options.ranks_per_device - 1) / options.ranks_per_device;
  if (options.device == DeviceChoice::kAuto && needed > count) {
    note_once(count == 0 ? "computing on the cpu: " + why
                         : fmt::format("computing on the cpu: {} ranks on this host, {} CUDA device(s)", local_size, count));
    return {};
  }
  if (count == 0) fail(ErrorCode::kSystem, "device=cuda: {}; use device=cpu, or see `dattn doctor`", why);
  require(
      needed <= count,
      "device=cuda: {} ranks on this host, {} to a device, need {} CUDA devices; there are {}: start at most {} ranks, or set "
      "ranks_per_device={}",
      local_size, options.ranks_per_device, needed, count, count * options.ranks_per_device, (local_size + count - 1) / count);
  return {DeviceKind::kCuda, static_cast<std::int8_t>(local_rank / options.ranks_per_device)};
}

std::unique_ptr<Communicator> device_world(std::unique_ptr<Communicator> control, const DeviceOptions& options,
                                           double timeout_s) {
  const Device own = current_device();
  const std::vector<std::string> places = control->gather_strings(place_of(own), {"devices"});
  require_one_kind(places, own);
  if (!own.is_cuda()) return control;
  const bool shared = shares_devices(places);
  Transfers transfers = options.transfers;
  if (transfers == Transfers::kAuto) transfers = shared || !probe_nccl().found ? Transfers::kStaged : Transfers::kNccl;
  note_once(fmt::format("{} ranks on CUDA devices{}: tensors travel {}", control->size(), shared ? ", some shared" : "",
                        transfers == Transfers::kNccl ? "by NCCL" : "through host memory"));
  if (transfers == Transfers::kStaged) return staged(std::move(control));
  if (shared) pretend_hosts(control->rank());
  NcclOptions nccl = NcclOptions::from_environment(timeout_s);
  nccl.ordered_sums = options.ordered_sums;
  return nccl_world(std::move(control), nccl);
}

void run_on_device(const DeviceOptions& options, std::unique_ptr<Communicator> control, int local_rank, int local_size,
                   double timeout_s, const std::function<void(Communicator&)>& body) {
  const DeviceScope scope(choose_device(options, local_rank, local_size));
  const auto world = device_world(std::move(control), options, timeout_s);
  body(*world);
  current_stream().synchronize();  // what is still under way may yet fail
}

void run_on_device(const DeviceOptions& options, Communicator& threads, double timeout_s,
                   const std::function<void(Communicator&)>& body) {
  run_on_device(options, whole_group(threads), threads.rank(), threads.size(), timeout_s, body);
}

std::unique_ptr<Communicator> whole_group(Communicator& world) {
  std::vector<int> everyone;
  for (int rank = 0; rank < world.size(); ++rank) everyone.push_back(rank);
  return world.split(everyone, world.name());
}

}  // namespace dattn
