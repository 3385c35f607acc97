// Where a distributed run enters the transformer. The model knows no ranks: it calls these interfaces, whose local
// versions do nothing special and whose distributed versions (parallel/) gather, scatter and exchange.
//
// Letters: B batch rows here, S sequence rows here, N = B * S token rows in row order (b major), H query heads here,
// K KV heads here, D head dim, M model dim.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/tensor/tensor.h"

namespace dattn {

// Which call of attention it is: the key of what is saved for backward, and of dropout.
struct AttentionSite {
  int layer = 0;
  bool training = false;             // probabilities are dropped where the attention was made to do so
  std::uint64_t dropout_stream = 0;  // of step and layer, below 2^32
  std::int64_t batch_begin = 0;      // global number of the first batch row
};

// Attention of one layer. Saves what its backward needs until that is called (or until drop()).
class Attention {
 public:
  virtual ~Attention() = default;
  // q [B, S, H, D], k and v [B, S, K, D], storage type of the run; returns out [B, S, H, D] in that type.
  virtual Tensor forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) = 0;
  struct Gradients {
    Tensor dq, dk, dv;  // fp32, shapes of q, k, v
  };
  // site, q, k and v are those of the forward call (the caller keeps or recomputes them); dout [B, S, H, D].
  virtual Gradients backward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v,
                             const TensorView& dout) = 0;
  // Forgets what forward saved: no backward of that call will come (evaluation, generation, recomputation).
  virtual void drop(int /*layer*/) {}
};

// The border between the residual stream and the parts of a block that are cut over the tensor axis. On one rank both
// are the identity. Tensor parallelism: enter is the identity (backward: sum over the axis), leave the sum over the
// axis (backward: identity). With sequence parallelism the residual rows are cut over the axis too: enter gathers the
// rows (backward: reduce-scatter), leave is a reduce-scatter (backward: gather).
class Boundary {
 public:
  virtual ~Boundary() = default;
  virtual std::int64_t residual_rows(std::int64_t rows) const { return rows; }  // of N token rows, how many are kept here
  virtual std::int64_t residual_begin(std::int64_t) const { return 0; }         // and from which one on
  // rows: N. x holds residual_rows(N) x M numbers; the result holds N x M, and the reverse for leave. fp32, but for enter,
  // which takes and gives back the compute type.
  virtual Tensor enter(Tensor x, std::int64_t) { return x; }
  virtual Tensor enter_backward(Tensor dy, std::int64_t) { return dy; }
  virtual Tensor leave(Tensor x, std::int64_t) { return x; }
  virtual Tensor leave_backward(Tensor dy, std::int64_t) { return dy; }
};

// Sums over the ranks that hold the parts of a vocabulary: what a vocabulary-parallel cross-entropy needs.
class VocabularyReduction {
 public:
  virtual ~VocabularyReduction() = default;
  virtual void sum(const TensorView&) {}      // fp32, contiguous, in place
  virtual void maximum(const TensorView&) {}  // fp32, contiguous, in place
};

// Which part of everything that is cut over the tensor axis (heads, hidden units, vocabulary) this model holds.
struct ModelPart {
  int index = 0;
  int count = 1;
};

// The tokens of one micro-batch on this rank, and where they stand in the whole job: keys of dropout and positions.
struct TokenBatch {
  std::int64_t batch = 0;                   // B
  std::span<const std::int32_t> tokens;     // [B, S]
  std::span<const std::int32_t> targets;    // [B, S]; -1 = no loss
  std::span<const std::int64_t> positions;  // [S], global position of each sequence row
  std::int64_t batch_begin = 0;             // global number of the first batch row
  std::uint64_t step = 0;                   // keys dropout
  double loss_scale = 1.0;                  // 1 / number of targets in the whole job's step: the loss is a mean over those
  double gradient_scale = 1.0;              // what gradients are multiplied by, beside loss_scale
  bool first = false;                       // of a step: gradients are written, whatever they were, not added
};

}  // namespace dattn
