// The residual stream: x + dropout(branch + bias), and its backward. Dropout is keyed by where an element stands in the
// whole job (step, place in the model, batch row, position, feature), so every mesh drops the same elements, backward
// need not keep a mask, and a replay drops them again.
#pragma once

#include <span>

#include "core/nn/parameter.h"
#include "core/nn/row_tree.h"

namespace dattn {

// The token rows that the residual stream holds here: [begin, begin + count) of B * S rows in b-major order.
struct TokenRows {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::span<const std::int64_t> positions;  // [S], of each sequence row
  std::int64_t batch_begin = 0;             // global number of the first batch row
  RowTree tree = {};                        // the order of sums over them
  const std::int64_t* on_device = nullptr;  // the positions again, where the tensors are on a device that needs them

  std::int64_t batch_row(std::int64_t row) const {
    return batch_begin + (begin + row) / static_cast<std::int64_t>(positions.size());
  }
  std::int64_t position(std::int64_t row) const {
    return positions[static_cast<std::size_t>((begin + row) % static_cast<std::int64_t>(positions.size()))];
  }
};

// One place of the model where elements are dropped, in one step. p = 0: nothing is.
struct Dropout {
  double p = 0.0;
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::uint64_t site = 0;
};

// x [R, M] fp32 *= mask / (1 - p); forward and backward alike.
void dropout_apply(const Dropout& dropout, const TokenRows& rows, const TensorView& x);

// x [R, M] + dropout(branch + bias), in the memory of `branch`. fp32; bias [M] or none.
Tensor residual_forward(const Dropout& dropout, const TokenRows& rows, const TensorView& x, Tensor branch,
                        const Parameter* bias);
// The gradient of `branch` from that of the sum, dy [R, M]; adds to the gradient of the bias.
Tensor residual_backward(const Dropout& dropout, const TokenRows& rows, const TensorView& dy, Parameter* bias);

}  // namespace dattn
