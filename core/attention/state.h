// A partial attention result is a state (out [B, S, H, V], lse [B, H, S]); states over disjoint keys merge. Merging is
// associative and commutative up to rounding, with identity (0, -inf).
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include "core/tensor/tensor.h"

namespace dattn {

// (out, lse) := merge((out, lse), (other_out, other_lse)). All four in the accumulator type; equal shapes.
void merge_state(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse);

// Makes (out, lse) the identity: 0 and -inf.
void clear_state(const TensorView& out, const TensorView& lse);

// delta [B, H, S] := sum over V of dout * out. dout in storage type, out in the storage or accumulator type.
void attention_delta(const TensorView& dout, const TensorView& out, const TensorView& delta);

}  // namespace dattn
