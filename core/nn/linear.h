// Linear layer: y = x W^T + b. A part of the model holds rows of W (outputs: q, k, v, up, gate, vocabulary) or columns of
// W (inputs: attention out, down); that is a choice of slices and nothing in here depends on it. Row-cut layers leave
// their bias to the residual stream, where it is added once (see residual.h).
#pragma once

#include "core/nn/parameter.h"
#include "core/nn/row_tree.h"

namespace dattn {

struct Linear {
  Parameter* weight = nullptr;  // [out, in]
  Parameter* bias = nullptr;    // [out], or none
};

// With a tree, products are taken leaf by leaf and sums over rows in its order.

// y [N, out] in type `result`; x [N, in] fp32, bf16 or fp16, the type that the product is computed in.
Tensor linear_forward(const Linear& layer, const TensorView& x, DType result, const RowTree& tree = {});
// gelu(y) [N, out], as one product where there is no tree; y itself is left in `y`.
Tensor linear_gelu_forward(const Linear& layer, const TensorView& x, DType result, Tensor& y, const RowTree& tree = {});
// Adds to the gradients: dW += dy^T x (or writes it: no sum, and no zeros to begin with), db += sum over rows of dy. dy [N,
// out] in the type of x. With a tree it always adds.
void linear_backward_weights(const Linear& layer, const TensorView& x, const TensorView& dy, const RowTree& tree = {},
                             bool accumulate = true);
// dx [N, in] fp32 = dy W, or dx += dy W.
void linear_backward_input(const Linear& layer, const TensorView& dy, const TensorView& dx, bool accumulate,
                           const RowTree& tree = {});
// to [out, in] fp32 = dy^T x, or += that, of one leaf: x [n, in], dy [n, out].
void leaf_product(const TensorView& dy, const TensorView& x, const TensorView& to, bool accumulate);

// x itself where it has the type already, else a rounded copy.
Tensor to_compute(Tensor x, DType type);
// A view of the type: of x itself, or of a copy kept in `storage`.
TensorView as_compute(const TensorView& x, DType type, Tensor& storage);

// sums [M] fp32 += sum over rows of x [N, M]. The order does not depend on the number of threads.
void add_column_sums(const TensorView& x, const TensorView& sums, const RowTree& tree = {});

}  // namespace dattn
