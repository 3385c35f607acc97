#include "parallel/comm/rank_place.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include <fmt/format.h>

#include "core/attention/cpu/paths.h"
#include "core/base/error.h"
#include "core/base/host.h"
#include "core/base/log.h"
#include "core/device/cuda_module.h"
#include "parallel/comm/nccl_api.h"

namespace dattn {
namespace {

constexpr std::string RankPlace::*kParts[] = {&RankPlace::host,  &RankPlace::device,  &RankPlace::version, &RankPlace::nccl,
                                              &RankPlace::cudnn, &RankPlace::runtime, &RankPlace::driver,  &RankPlace::gpu,
                                              &RankPlace::cpu,   &RankPlace::products};

std::string text_of(const RankPlace& place) {
  std::string all;
  for (const auto part : kParts) all += place.*part + "\n";
  return all;
}

RankPlace place_from(std::string_view text) {
  RankPlace place;
  for (const auto part : kParts) {
    place.*part = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), (place.*part).size() + 1));
  }
  return place;
}

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
// The same bits on every mesh come of the same instructions alone.
constexpr Compared kRefusedInvariant[] = {
    {"the GPU", &RankPlace::gpu, "determinism invariant needs GPUs of one kind; use such, or determinism: repeatable"},
    {"the CPU kernel", &RankPlace::cpu,
     "determinism invariant needs one for all ranks; set DATTN_CPU to the one that all hosts have, for example DATTN_CPU=avx2"},
    {"the instructions of matrix products", &RankPlace::products,
     "determinism invariant needs the same on all ranks; set DNNL_MAX_CPU_ISA to those that all hosts have, for example "
     "DNNL_MAX_CPU_ISA=AVX2"}};
// What a user may not be able to change, and often works.
constexpr Compared kNoted[] = {
    {"CUDA of the driver", &RankPlace::driver, "where ranks hang or their results differ, install one driver on all hosts"},
    {"the GPU", &RankPlace::gpu, "all wait for the slowest"}};

// Kernel cudnn is the first choice of attention on a device (core/attention/kernel.cpp).
std::string cudnn_in_use() {
  const char* forced = std::getenv("DATTN_KERNEL");
  return forced == nullptr || *forced == '\0' || std::string_view(forced) == "cudnn" ? cuda_module().cudnn_version() : "";
}

void require_equal(const Compared& compared, const std::vector<RankPlace>& places, std::size_t rank) {
  require(places[rank].*compared.version == places[0].*compared.version, "{}", compared.text(places[rank], rank, places[0]));
}

// All ranks hear all and say the same.
void require_alike(const std::vector<RankPlace>& places, bool notes) {
  const auto is_cuda = [](const RankPlace& place) { return place.device.starts_with("cuda"); };
  const RankPlace& first = places[0];
  for (std::size_t rank = 1; rank < places.size(); ++rank) {
    const RankPlace& other = places[rank];
    require(other.version == first.version,
            "rank {} on {} runs dattn {}, rank 0 on {} runs {}; install one version on all hosts", rank, other.host,
            other.version, first.host, first.version);
    require(is_cuda(other) == is_cuda(first), "rank {} on {} computes on {}, rank 0 on {} on {}; set device=cpu or device=cuda",
            rank, other.host, other.device, first.host, first.device);
    for (const Compared& compared : kRefused) require_equal(compared, places, rank);
    for (const Compared& compared : kNoted) {
      if (notes && other.*compared.version != first.*compared.version)
        note_once(compared.text(other, rank, first), LogLevel::kInfo);
    }
  }
}

}  // namespace

RankPlace place_of_rank(bool uses_nccl) {
  const Device own = current_device();
  RankPlace place;
  place.host = host_name();
  place.device = to_text(own);
  place.version = DATTN_VERSION;
  if (!own.is_cuda()) {
    place.cpu = cpu::choose_path().name;
    return place;
  }
  if (uses_nccl) place.nccl = probe_nccl().version;
  const CudaVersions cuda = cuda_module().versions();
  place.cudnn = cudnn_in_use();
  place.runtime = cuda.runtime;
  place.driver = cuda.driver;
  std::string why;
  const CudaDevice& gpu = cuda_devices(why)[static_cast<std::size_t>(own.index)];
  place.gpu = fmt::format("{} (compute capability {}.{})", gpu.name, gpu.major, gpu.minor);
  return place;
}

std::vector<RankPlace> gather_alike(Communicator& control, const RankPlace& mine) {
  std::vector<RankPlace> places;
  for (const std::string& text : control.gather_strings(text_of(mine), {"devices"})) places.push_back(place_from(text));
  require_alike(places, control.rank() == 0);
  return places;
}

void require_same_instructions(const std::vector<RankPlace>& places) {
  for (std::size_t rank = 1; rank < places.size(); ++rank) {
    for (const Compared& compared : kRefusedInvariant) require_equal(compared, places, rank);
  }
}

}  // namespace dattn
