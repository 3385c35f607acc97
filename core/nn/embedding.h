// Token embedding over a slice of the vocabulary, and learned positions. Tokens outside the slice give rows of zeros;
// Boundary::leave adds up the parts.
#pragma once

#include <span>

#include "core/nn/parameter.h"
#include "core/nn/residual.h"

namespace dattn {

// x [N, M] fp32 = rows of the table [V, M] that the tokens [N] name. table.held is the slice.
Tensor embedding_forward(const Parameter& table, std::span<const std::int32_t> tokens);
// gradient rows of the table += dx [N, M]; those of gradient2 where there is one. In the order of a tree if given one.
void embedding_backward(Parameter& table, std::span<const std::int32_t> tokens, const TensorView& dx, const RowTree& tree = {});

// x [R, M] += rows of the table [max_seq, M] at the rows' positions; and the gradient of that. A position stands once in a
// sequence: there is nothing to order within one.
void position_forward(const Parameter& table, const TokenRows& rows, const TensorView& x);
void position_backward(Parameter& table, const TokenRows& rows, const TensorView& dx);

}  // namespace dattn
