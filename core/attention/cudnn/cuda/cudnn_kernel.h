// The attention kernel `cudnn`: bf16 and fp16 attention by cuDNN's graphs.
#pragma once

#include "core/attention/kernel.h"

namespace dattn {

// Calls that cuDNN does not take (calls.h: suits; or its own refusal of a shape) go on to `next`, and the log says so once.
const AttentionKernel& cudnn_kernel(const AttentionKernel& next);

}  // namespace dattn
