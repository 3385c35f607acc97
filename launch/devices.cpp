#include "launch/devices.h"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/host.h"
#include "core/base/log.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "core/nn/matmul.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/staged.h"

namespace dattn {
namespace {

// What every rank says of itself: its host, so that ranks which share a device are seen, its device and its release; and the
// versions of what it computes with, empty where it has none or does not use it.
struct RankPlace {
  std::string host, device, version, nccl, cudnn, runtime, driver, gpu;

  static constexpr std::string RankPlace::*kParts[] = {&RankPlace::host,   &RankPlace::device, &RankPlace::version,
                                                       &RankPlace::nccl,   &RankPlace::cudnn,  &RankPlace::runtime,
                                                       &RankPlace::driver, &RankPlace::gpu};
  std::string text() const {
    std::string all;
    for (const auto part : kParts) all += this->*part + "\n";
    return all;
  }
  static RankPlace of(std::string_view text) {
    RankPlace place;
    for (const auto part : kParts) {
      place.*part = text.substr(0, text.find('\n'));
      text.remove_prefix(std::min(text.size(), (place.*part).size() + 1));
    }
    return place;
  }
};

// What is told of two ranks that differ in it.
struct Compared {
  const char* what;
  std::string RankPlace::*version;
  const char* remedy;

  std::string text(const RankPlace& other, std::size_t rank, const RankPlace& first) const {
    const std::string &theirs = other.*version, &ours = first.*version;
    return fmt::format("{} of rank {} on {}: {}, of rank 0 on {}: {}; {}", what, rank, other.host,
                       theirs.empty() ? "none" : theirs, first.host, ours.empty() ? "none" : ours, remedy);
  }
};
// Sums are taken in its order, or both ends of a transfer are its own: one version for all.
constexpr Compared kRefused[] = {
    {"NCCL", &RankPlace::nccl, "install one version on all hosts, name it with DATTN_NCCL, or set comm.transfers=staged"},
    {"cuDNN", &RankPlace::cudnn,
     "install one version on all hosts, name it with DATTN_CUDNN, or set DATTN_KERNEL=cuda on all ranks"},
    {"the CUDA runtime", &RankPlace::runtime, "install one build of dattn on all hosts"}};
// What a user may not be able to change, and often works.
constexpr Compared kNoted[] = {
    {"CUDA of the driver", &RankPlace::driver, "where ranks hang or their results differ, install one driver on all hosts"},
    {"the GPU", &RankPlace::gpu, "all wait for the slowest, and determinism invariant holds among GPUs of one kind alone"}};

// Kernel cudnn is the first choice of attention on a device (core/attention/kernel.cpp).
std::string cudnn_in_use() {
  const char* forced = std::getenv("DATTN_KERNEL");
  return forced == nullptr || *forced == '\0' || std::string_view(forced) == "cudnn" ? cuda_module().cudnn_version() : "";
}

RankPlace place_of(const DeviceOptions& options) {
  const Device own = current_device();
  RankPlace place;
  place.host = host_name();
  place.device = to_text(own);
  place.version = options.version.empty() ? DATTN_VERSION : options.version;
  if (!own.is_cuda()) return place;
  if (options.transfers != Transfers::kStaged) place.nccl = probe_nccl().version;
  const CudaVersions cuda = cuda_module().versions();
  place.cudnn = cudnn_in_use();
  place.runtime = cuda.runtime;
  place.driver = cuda.driver;
  std::string why;
  const CudaDevice& gpu = cuda_devices(why)[static_cast<std::size_t>(own.index)];
  place.gpu = fmt::format("{} (compute capability {}.{})", gpu.name, gpu.major, gpu.minor);
  return place;
}

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

// All ranks hear all and say the same.
void require_alike(const std::vector<RankPlace>& places) {
  const auto is_cuda = [](const RankPlace& place) { return place.device.starts_with("cuda"); };
  const RankPlace& first = places[0];
  for (std::size_t rank = 1; rank < places.size(); ++rank) {
    const RankPlace& other = places[rank];
    require(other.version == first.version,
            "rank {} on {} runs dattn {}, rank 0 on {} runs {}; install one version on all hosts", rank, other.host,
            other.version, first.host, first.version);
    require(is_cuda(other) == is_cuda(first), "rank {} on {} computes on {}, rank 0 on {} on {}; set device=cpu or device=cuda",
            rank, other.host, other.device, first.host, first.device);
    for (const Compared& compared : kRefused)
      require(other.*compared.version == first.*compared.version, "{}", compared.text(other, rank, first));
    for (const Compared& compared : kNoted) {
      if (other.*compared.version != first.*compared.version) note_once(compared.text(other, rank, first), LogLevel::kInfo);
    }
  }
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
  const RankPlace mine = place_of(options);
  std::vector<RankPlace> places;
  for (const std::string& text : control->gather_strings(mine.text(), {"devices"})) places.push_back(RankPlace::of(text));
  require_alike(places);
  if (!current_device().is_cuda()) return control;
  const bool shared = shares_devices(places);
  Transfers transfers = options.transfers;
  if (transfers == Transfers::kAuto) transfers = shared || mine.nccl.empty() ? Transfers::kStaged : Transfers::kNccl;
  note_once(fmt::format("{} ranks on CUDA devices{}: tensors travel {}", control->size(), shared ? ", some shared" : "",
                        transfers == Transfers::kNccl ? "by NCCL" : "through host memory"));
  if (transfers == Transfers::kStaged) return staged(std::move(control));
  if (shared) pretend_hosts(control->rank());
  NcclOptions nccl = NcclOptions::from_environment(timeout_s);
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
