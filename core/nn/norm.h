// LayerNorm (Ba, Kiros and Hinton, 2016) and RMSNorm (Zhang and Sennrich, 2019) over the features of a row, fp32:
//   layernorm  y = (x - mean) / sqrt(variance + epsilon) * w + b        rmsnorm  y = x / sqrt(mean(x^2) + epsilon) * w
#pragma once

#include "core/nn/parameter.h"
#include "core/nn/row_tree.h"

namespace dattn {

struct Norm {
  Parameter* weight = nullptr;  // [M]
  Parameter* bias = nullptr;    // [M], or none
  bool centered = true;         // layernorm: the mean is taken off
  float epsilon = 1e-5f;
};

// y [R, M] in type `result`; stats [R, 2] receives the mean (0 for rmsnorm) and the reciprocal standard deviation of each row.
Tensor norm_forward(const Norm& norm, const TensorView& x, const TensorView& stats, DType result = DType::kF32);
// dx [R, M] += gradient through the norm; adds to the gradients of weight and bias, in the order of a tree if given one.
void norm_backward(const Norm& norm, const TensorView& x, const TensorView& stats, const TensorView& dy, const TensorView& dx,
                   const RowTree& tree = {});

}  // namespace dattn
