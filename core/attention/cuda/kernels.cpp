#include "core/attention/cuda/kernels.h"

namespace dattn {

std::span<const AttentionKernel* const> cuda_kernels() { return {}; }

}  // namespace dattn
