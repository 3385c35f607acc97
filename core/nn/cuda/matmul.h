// The device's matrix product, and which library does it.
#pragma once

#include <string>

#include "core/device/cuda/runtime.h"
#include "core/nn/cuda_nn.h"
#include "core/tensor/tensor.h"

namespace dattn::cuda {

// See CudaNn::matmul (core/nn/cuda_nn.h).
void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream);
std::string matmul_library();  // path and version, for doctor; or that there is none, and why

}  // namespace dattn::cuda
