// Rotary positions: pairs of features (i, i + D/2) of q and k are turned by position * base^(-2 i / D), so that scores
// depend on differences of positions. Source: Su et al., "RoFormer", 2021; pairs as in Llama's released weights.
#pragma once

#include <span>

#include "core/tensor/tensor.h"

namespace dattn {

// [S, D]: cosines of the D/2 angles of each row, then their sines. Angles in fp64: positions go to 10^9 and beyond.
Tensor rope_table(std::span<const std::int64_t> positions, std::int64_t head_dim, double base);

// Turns x [B, S, H, D] (contiguous, fp32 or bf16) in place; `inverse` turns back, which is the backward of turning.
void rope_apply(const TensorView& x, const TensorView& table, bool inverse);

}  // namespace dattn
