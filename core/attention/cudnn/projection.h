// What a backward graph of cuDNN is given in place of out. It reads out for one thing, delta = sum over V of dout * out, and
// our steps come with delta alone, since out stays at its row's owner. The projection of out on dout has the same product with
// dout and needs only delta:
//
//   out' = delta * dout / |dout|^2,   sum of dout * out' = delta,   |out'| <= |out|
//
// All terms of that sum have delta's sign, so that rounding out' to bf16 (fp16) changes delta by no more than 2^-9 (2^-12) of
// itself, where rounding out changes it by up to as much of |dout| |out|.
#pragma once

#include "core/device/cuda_module.h"

namespace dattn::cudnn {

// out [B, S, H, V] and dout, bf16 or fp16, equal strides; delta [B, H, S], fp32.
void project(const TensorView& dout, const TensorView& delta, const TensorView& out, NativeStream stream);

}  // namespace dattn::cudnn
