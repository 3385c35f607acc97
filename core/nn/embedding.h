// Token embedding over a slice of the vocabulary, and learned positions. Tokens outside the slice give rows of zeros;
// Boundary::leave adds up the parts.
#pragma once

#include <span>

#include "core/nn/parameter.h"
#include "core/nn/residual.h"

namespace dattn {

// x [N, M] fp32 = rows of the table [V, M] that the tokens [N] name. table.held is the slice.
Tensor embedding_forward(const Parameter& table, std::span<const std::int32_t> tokens);
// gradient rows of the table += dx [N, M].
void embedding_backward(Parameter& table, std::span<const std::int32_t> tokens, const TensorView& dx);

// x [R, M] += rows of the table [max_seq, M] at the rows' positions; and the gradient of that.
void position_forward(const Parameter& table, const TokenRows& rows, const TensorView& x);
void position_backward(Parameter& table, const TokenRows& rows, const TensorView& dx);

}  // namespace dattn
