// Elements of storage types in kernels: read and written as fp32.
#pragma once

#include "core/base/dtype.h"
#include "core/base/with_number.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/ptx.h"

namespace dattn::cuda {

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(BFloat16 x) { return static_cast<float>(x); }
__device__ __forceinline__ float load(Float16 x) { return widen_f16(x.bits); }
__device__ __forceinline__ void store(float& place, float x) { place = x; }
__device__ __forceinline__ void store(BFloat16& place, float x) { place = BFloat16(x); }

__device__ __forceinline__ void store(Float16& place, float x) { place.bits = round_f16(x); }

}  // namespace dattn::cuda
