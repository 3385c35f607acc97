// What the layers need on the host's side of a CUDA device: the module's table, and lists that kernels read.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "core/nn/cuda_nn.h"

namespace dattn {

inline const CudaNn& cuda_nn() { return *cuda_module().nn; }
inline NativeStream cuda_stream() { return current_stream().native(); }

// On the current device.
Tensor to_device(std::span<const std::int32_t> values);  // int32 [n]
Tensor to_device(std::span<const std::int64_t> values);  // [n] of 8 bytes each, typed fp64 for want of a wide integer type

// Rows that are added up by target: targets[row] names the row of the sum, or is negative. Ascending rows within a target.
class RowGroups {
 public:
  explicit RowGroups(std::span<const std::int32_t> targets);
  CudaRowGroups view() const;

 private:
  std::int64_t groups_ = 0;
  Tensor target_, begin_, rows_;
};

}  // namespace dattn
