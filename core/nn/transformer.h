// The transformer: embedding, blocks, final norm, output layer, loss; forward and backward. Pre-norm blocks as in GPT-2
// and Llama; causal or full (an encoder) is the business of the Attention it is given.
//
//   tokens -> embed -> leave -> (+ position, dropout) -> x
//   block:  x += dropout(leave(attention(enter(norm(x)))));   x += dropout(leave(mlp(enter(norm(x)))))
//   head:   logits = enter(norm(x)) W^T -> cross-entropy over the vocabulary
//
// It knows no ranks: one part of the heads, hidden units and vocabulary is built, and `enter`/`leave` (Boundary),
// Attention and VocabularyReduction do what crosses ranks. Every part must make the same calls in the same order.
//
// Letters: B batch rows, S sequence rows, N = B * S token rows, R residual rows (N, or this part's of them with sequence
// parallelism), M dim, H and K query and KV heads here, D head dim, F hidden units here, V vocabulary here.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/attention/positions.h"
#include "core/nn/hooks.h"
#include "core/nn/model_config.h"
#include "core/nn/parameter.h"

namespace dattn {

// What is forgotten in the forward pass and computed again in the backward pass.
enum class Recompute {
  kNone,   // all activations are kept
  kBlock,  // a block keeps its input only
};
Recompute recompute_from(std::string_view name);  // "none" | "block"; throws Error(kBadInput)
std::string_view name_of(Recompute recompute);

// The loss holds at most so many logits, 64 MiB, whatever the batch: of 50,257 tokens, those of 333 rows.
inline constexpr std::int64_t kLogitsAtATime = std::int64_t{1} << 24;
// How many of `rows` have their logits held at a time, of a vocabulary of `vocab`: pieces of one size, since a last one of few
// rows would be multiplied slowly.
std::int64_t logit_rows(std::int64_t rows, std::int64_t vocab, std::int64_t logits_at_a_time = kLogitsAtATime);

struct TransformerOptions {
  ModelPart part;
  DType compute = DType::kF32;  // kBF16, kF16: operands of matrix products and q, k, v are rounded to it; sums, the
                                // residual stream, parameters and gradients stay fp32
  Recompute recompute = Recompute::kNone;
  std::int64_t logits_at_a_time = kLogitsAtATime;
  std::uint64_t seed = 1;  // initial values and dropout
  int leaves = 0;          // here, of the kLeaves of a sequence, whose sums follow the tree of row_tree.h; one part and
                           // batches of one row then. 0: any fixed order
};

// The heads, hidden units and vocabulary that a part holds, numbered globally.
struct PartRanges {
  Interval heads;
  Interval kv_heads;
  Interval hidden;
  Interval vocab;
};
PartRanges ranges_of(const ModelConfig& resolved, const ModelPart& part);

class Transformer {
 public:
  // The hooks must outlive the transformer. Throws Error(kBadInput) as resolve(config) does.
  Transformer(const ModelConfig& config, const TransformerOptions& options, Attention& attention, Boundary& boundary,
              VocabularyReduction& vocabulary);
  ~Transformer();
  Transformer(Transformer&&) noexcept;

  const ModelConfig& config() const;                  // resolved
  const PartRanges& ranges() const;                   // of this part
  std::span<Parameter* const> parameters() const;     // stable order, equal on every part
  Parameter& parameter(std::string_view name) const;  // throws Error(kBadInput) for an unknown one
  // Gradients by the tree are sums over one row's leaves here. Those of a tied token table are two then, each to be summed
  // over the sequence on its own: gradient and gradient2.
  void zero_gradients();

  // The sum of the losses of this rank's targets, times batch.loss_scale; equal on every part (so sum it over the
  // replicas only). Adds the gradients of that sum, times batch.gradient_scale, to the parameters' gradients, or, with
  // batch.first, writes them, which saves zero_gradients and a pass over those of weights. Throws
  // Error(kBadInput) for a token or target outside the vocabulary and a position that is not learned.
  double forward_backward(const TokenBatch& batch);
  // The same sum without dropout and without gradients.
  double loss(const TokenBatch& batch);
  // From now on values do not change, so that products need not round them anew in every pass: for inference, and before a pass
  // is captured in a graph.
  void freeze();
  // Logits of chosen token rows (numbered b * S + s): [rows, V] fp32, the vocabulary slice ranges().vocab. Without
  // dropout; targets are not read.
  Tensor logits(const TokenBatch& batch, std::span<const std::int64_t> rows);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dattn
