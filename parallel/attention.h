// The public entry: one attention call whose heads and sequence are spread over a mesh.
//
//   ShardedAttention attention(mesh, {.batch = 1, .seq_q = 1021, .seq_kv = 1021, .heads = 9, .kv_heads = 3,
//                                     .dim_qk = 64, .dim_v = 64}, {.mask = Mask::causal()});
//   auto result = attention.forward(q, k, v);              // this rank's shards
//   auto gradients = attention.backward(q, k, v, result, dout);
//
// A rank holds the positions its layout gives to its place on the sequence axes (ring, ulysses), and the heads that
// the tensor axis gives it: query heads are split ceil/floor, each part with the KV heads it needs. The batch is what
// this rank's data coordinate holds; the data axis does not take part.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "core/attention/kernel.h"
#include "core/attention/mask.h"
#include "core/nn/hooks.h"
#include "parallel/layout.h"
#include "parallel/mesh.h"

namespace dattn {

// Global sizes of one attention call.
struct AttentionShape {
  std::int64_t batch = 1;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
  std::int64_t heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t dim_qk = 64;
  std::int64_t dim_v = 64;
  DType dtype = DType::kF32;
};

struct AttentionOptions {
  Mask mask = Mask::causal();
  std::optional<double> softmax_scale;  // default 1 / sqrt(dim_qk)
  Layout layout = Layout::kZigzag;
  std::string strategy = "auto";  // a file of parallel/strategies, or auto
};

// The heads of one part of the tensor axis, numbered globally.
struct HeadRange {
  Interval q;
  Interval kv;
};
HeadRange heads_of(std::int64_t heads, std::int64_t kv_heads, int parts, int index);

struct AttentionResult {
  Tensor out;  // [B, S_local, H_local, V], storage type
  Tensor lse;  // [B, H_local, S_local], fp32 (fp64 for fp64 storage)
};

struct AttentionGradients {
  Tensor dq, dk, dv;  // accumulator type, shapes of q, k, v
};

struct Plan;

class ShardedAttention {
 public:
  // Plans the call; throws Error(kBadInput), on all ranks alike and before any communication, for what is refused.
  ShardedAttention(const Mesh& mesh, const AttentionShape& shape, const AttentionOptions& options);
  ~ShardedAttention();
  ShardedAttention(ShardedAttention&&) noexcept;

  const Positions& q_positions() const;  // of this rank's shard
  const Positions& kv_positions() const;
  HeadRange heads() const;  // of this rank's shard
  const Plan& forward_plan() const;
  const Plan& backward_plan() const;

  // q [B, Sq_local, H_local, D], k [B, Skv_local, K_local, D], v [B, Skv_local, K_local, V]; any strides, last axis
  // contiguous. `layer` names the call in errors and traces.
  AttentionResult forward(const TensorView& q, const TensorView& k, const TensorView& v, int layer = -1);
  AttentionGradients backward(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionResult& result,
                              const TensorView& dout, int layer = -1);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The attention of a model's layers on a mesh: what the transformer calls through core's Attention.
class DistributedAttention final : public Attention {
 public:
  // shape.batch is ignored: plans are made, and kept, for each batch size that arrives.
  DistributedAttention(const Mesh& mesh, const AttentionShape& shape, const AttentionOptions& options);
  ~DistributedAttention() override;

  Tensor forward(int layer, const TensorView& q, const TensorView& k, const TensorView& v) override;
  Gradients backward(int layer, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& dout) override;
  void drop(int layer) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dattn
