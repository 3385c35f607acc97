// What a case must give: the whole problem on one device by the reference kernel in fp64, and, but for fp64, by the library's
// own kernel in the case's type, whose error is the measure of what a sharded call may have.
#pragma once

#include <memory>

#include "tests/conformance/sweep.h"

namespace dattn::conformance {

inline constexpr std::uint64_t kDropoutStream = 9;

struct Results {
  Tensor out, lse, dq, dk, dv;  // query heads of one part of the tensor axis, all KV heads
  Tensor dbias, dsink;          // undefined without
};

struct Expected {
  Tensor q, k, v, dout, bias, sink;  // whole inputs, in the case's type
  HeadRange heads;                   // of the part
  Results exact;                     // fp64
  Results one_rank;                  // undefined in fp64 cases
};

// The same for all ranks of a process: computed by the first that asks.
std::shared_ptr<const Expected> expected(const Case& one, int tensor_index);

// A rank's shards of the inputs of its batch rows on its device, and the call that brings bias and sink.
struct ShardInputs {
  Tensor q, k, v, dout, bias, sink;
  AttentionCall call;
};
ShardInputs shard_inputs(const Expected& whole, const AttentionShape& shape, Interval batch, const ShardedAttention& attention,
                         Device device);

void bring_to_host(AttentionResult& result, AttentionGradients& gradients);

TensorView as_rows(const TensorView& lse);  // [B, H, S] seen as [B, S, H, 1]

// Rows `rows` and heads `heads` of a whole tensor [B, S, H, X].
Tensor shard_of(const TensorView& whole, const Positions& rows, Interval heads);

// The heads of a bias [B or 1, S, H or 1, N] that serve the query heads `heads`; of all rows, and of `rows`.
TensorView bias_part(const TensorView& bias, Interval heads);
Tensor bias_shard_of(const TensorView& bias, const Positions& rows, Interval heads);

}  // namespace dattn::conformance
