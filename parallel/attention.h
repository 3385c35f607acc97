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
#include <vector>

#include "core/attention/kernel.h"
#include "core/attention/mask.h"
#include "core/nn/hooks.h"
#include "parallel/layout.h"
#include "parallel/mesh.h"

namespace dattn {

// Of an additive bias [batch, S, heads, Skv]: false where one row or head serves all.
struct BiasShape {
  bool per_batch = true;
  bool per_head = true;
};

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
  std::optional<BiasShape> bias = {};  // present: every call brings a bias
  bool sink = false;                   // every call brings sink logits
};

// off and repeatable: same mesh, same bits (all kernels of this build are repeatable). invariant: the same bits on every
// mesh, layout and number of threads, by a plan of its own that replaces the strategy asked for.
enum class Determinism { kOff, kRepeatable, kInvariant };

struct AttentionOptions {
  Mask mask = Mask::causal();
  std::optional<double> softmax_scale = {};  // default 1 / sqrt(dim_qk)
  Layout layout = Layout::kZigzag;
  std::string strategy = "auto";  // a file of parallel/strategies, or auto
  Determinism determinism = Determinism::kRepeatable;
  double softcap = 0;                     // s = softcap * tanh(s / softcap); 0 = none
  std::vector<double> alibi_slopes = {};  // one per query head: s += slope * (k - q); empty = none
  double dropout = 0;                     // probability of dropping a pair, keyed by global positions
  std::uint64_t dropout_seed = 0;
};

// What changes from call to call.
struct AttentionCall {
  int layer = -1;                    // names the call in errors and traces
  std::uint64_t dropout_stream = 0;  // step and layer: another one, another dropout mask; below 2^32
  std::int64_t batch_begin = 0;      // global number of the first batch row here: keys dropout
  TensorView bias = {};              // [B or 1, S_local, H_local or 1, Skv], storage type; column = key position
  TensorView sink = {};              // [H_local], fp32
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

// The same in memory of somebody else's; lse contiguous.
struct AttentionResultView {
  TensorView out;
  TensorView lse;

  AttentionResultView(const TensorView& with_out, const TensorView& with_lse) : out(with_out), lse(with_lse) {}
  AttentionResultView(const AttentionResult& result) : out(result.out), lse(result.lse) {}  // NOLINT: used wherever one is read
};

struct AttentionGradients {
  Tensor dq, dk, dv;  // accumulator type, shapes of q, k, v
  // Learned terms, undefined without them: this rank's part of the sum. dbias [like bias], accumulator type: rows are whole;
  // what batch rows or heads share is summed over those held here, so add it up over the data or tensor axis. dsink [H_local],
  // accumulator type: summed over the rows and batch rows held here, so add it up over data and the sequence axes.
  Tensor dbias, dsink;
};

struct Plan;
struct RankPlan;

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
  const RankPlan& forward_rank_plan() const;  // this rank's part
  const RankPlan& backward_rank_plan() const;

  // q [B, Sq_local, H_local, D], k [B, Skv_local, K_local, D], v [B, Skv_local, K_local, V]; any strides, last axis
  // contiguous. backward takes the same call as its forward.
  AttentionResult forward(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionCall& call = {});
  AttentionGradients backward(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionResultView& result,
                              const TensorView& dout, const AttentionCall& call = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The attention of a model's layers on a mesh: what the transformer calls through core's Attention.
class DistributedAttention final : public Attention {
 public:
  // shape.batch is ignored: plans are made, and kept, for each batch size that arrives. Dropout is for training only: other
  // calls have plans without it.
  DistributedAttention(const Mesh& mesh, const AttentionShape& shape, const AttentionOptions& options);
  ~DistributedAttention() override;

  Tensor forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) override;
  Gradients backward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& dout) override;
  void drop(int layer) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dattn
