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

// Merges every row with a state that saw nothing but a logit: (out, lse) := merge((out, lse), (0, sink[h])). sink [H], fp32.
// Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023; learnable as in GPT-OSS, 2025.
void merge_sink(const TensorView& out, const TensorView& lse, const TensorView& sink);

// dsink [H], type of lse, += the gradient of the sink logits: -sum over b, s of exp(sink - lse) * delta, final lse and delta.
void add_sink_gradient(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink);

// delta [B, H, S] := sum over V of dout * out. dout in storage type, out in the storage or accumulator type.
void attention_delta(const TensorView& dout, const TensorView& out, const TensorView& delta);

}  // namespace dattn
