// Elements of storage types in kernels: read and written as fp32.
#pragma once

#include "core/base/dtype.h"
#include "core/device/cuda/language.h"

namespace dattn::cuda {

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(BFloat16 x) { return static_cast<float>(x); }
__device__ __forceinline__ void store(float& place, float x) { place = x; }
__device__ __forceinline__ void store(BFloat16& place, float x) { place = BFloat16(x); }

// Calls f with a value-initialised object of the C++ type that `type` stands for: fp32 or bf16.
template <class F>
void with_number(DType type, const F& f) {
  if (type == DType::kBF16)
    f(BFloat16{});
  else
    f(float{});
}

}  // namespace dattn::cuda
