// The lists of attention kernels, best first. Adding a kernel of the cpu: its file, its accessor in kernel.h, its name here.
#include "core/attention/kernel.h"

#include <array>
#include <cstdlib>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/device/cuda_module.h"

namespace dattn {

std::span<const AttentionKernel* const> attention_kernels(Device device) {
  if (device.is_cuda()) return cuda_module().kernels();
  static const std::array<const AttentionKernel*, 2> kernels{&cpu_kernel(), &reference_kernel()};
  return kernels;
}

const AttentionKernel& find_kernel(std::string_view name, Device device) {
  std::string known;
  for (const AttentionKernel* kernel : attention_kernels(device)) {
    if (kernel->name() == name) return *kernel;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", kernel->name());
  }
  fail(ErrorCode::kBadInput, "there is no attention kernel '{}' for {}; known: {}", name, to_text(device), known);
}

const AttentionKernel& select_kernel(const AttendTraits& traits) {
  const std::string problem = fmt::format("{} attention on {}, dims {} and {}", name_of(traits.storage),
                                          traits.device.is_cuda() ? "cuda" : "cpu", traits.dim_qk, traits.dim_v);
  const char* forced = std::getenv("DATTN_KERNEL");
  if (forced != nullptr && *forced != '\0') {
    const AttentionKernel& kernel = find_kernel(forced, traits.device);
    const Support support = kernel.supports(traits);
    require(support.ok, "DATTN_KERNEL={} cannot run {}: {}; unset it to let the library choose", forced, problem, support.why);
    note_once(fmt::format("{}: kernel {} (DATTN_KERNEL)", problem, kernel.name()));
    return kernel;
  }
  for (const AttentionKernel* kernel : attention_kernels(traits.device)) {
    const Support support = kernel->supports(traits);
    if (support.ok) {
      note_once(fmt::format("{}: kernel {}", problem, kernel->name()));
      return *kernel;
    }
    note_once(fmt::format("{}: kernel {} refused: {}", problem, kernel->name(), support.why));
  }
  fail(ErrorCode::kBadInput, "no attention kernel supports {}", problem);
}

}  // namespace dattn
