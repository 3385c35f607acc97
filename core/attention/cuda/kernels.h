// The attention kernels of the CUDA module.
#pragma once

#include <span>

#include "core/attention/kernel.h"

namespace dattn {

std::span<const AttentionKernel* const> cuda_kernels();  // best first

}  // namespace dattn
