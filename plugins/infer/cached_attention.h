// Attention with a key/value cache that is spread over the mesh. While generating, every rank of the sequence group
// (ring x ulysses) computes the same tokens; the cache is what is cut: positions over ring, in blocks dealt round robin,
// and heads over ulysses, within the heads that the tensor axis gives.
//
//   ring 2, blocks of 4     position   0..3  4..7  8..11 ..
//                           ring rank   0     1     0
//
//   q of the new tokens, own heads ---> attend to the own cached positions ---> state (out, lse)
//   states: gathered over ring and merged in rank order; heads: gathered over ulysses
//
// The merge is the tree decode of state.h with one level; every rank ends with the same bits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/nn/hooks.h"
#include "parallel/attention.h"
#include "parallel/mesh.h"

namespace dattn {

class CachedAttention final : public Attention {
 public:
  static constexpr std::int64_t kBlock = 32;  // positions dealt to a ring rank at a time

  struct Options {
    int layers = 1;
    std::int64_t heads = 1;  // of the whole model
    std::int64_t kv_heads = 1;
    std::int64_t dim = 64;
    double scale = 0;  // 0: 1 / sqrt(dim)
    double softcap = 0;
    std::vector<double> alibi_slopes = {};
    Mask mask = Mask::causal();
    std::int64_t window = 0;  // positions the model was made for: the mask is compiled for this many
    DType dtype = DType::kF32;
  };
  CachedAttention(const Mesh& mesh, const Options& options);

  // The queries of a call stand behind what the layer holds already: their first position is length(layer). q [1, S, H, D]
  // and k, v [1, S, K, D] hold the heads of this rank's tensor part.
  Tensor forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) override;
  Gradients backward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& dout) override;

  // What decides, beside what it copies from the host, the work of a call of one token on a device (core/device/step_graph.h);
  // all layers have room for it from now on.
  std::vector<std::int64_t> next_token_key();

  std::int64_t length() const { return layers_.back().length; }     // positions held by all layers
  std::int64_t cached_rows() const { return layers_.back().rows; }  // of these, on this rank
  void clear();                                                     // forgets all positions, keeps the memory

 private:
  struct Layer {
    Tensor k, v;              // [1, capacity, own KV heads, D]
    std::int64_t rows = 0;    // filled rows
    std::int64_t length = 0;  // positions seen, on all ranks together
  };
  void append(Layer& layer, const TensorView& k, const TensorView& v);
  void grow(Layer& layer, std::int64_t rows) const;
  TensorView held(const Tensor& cache, const Layer& layer) const;
  Positions own_positions(std::int64_t length) const;
  Tensor merge_over_ring(Tensor out, Tensor lse) const;
  Tensor gather_heads(const TensorView& own, std::int64_t heads) const;
  HeadRange own_heads(int ulysses_index) const;

  const Mesh& mesh_;
  Options options_;
  RegionList mask_;
  HeadRange tensor_heads_;  // of this tensor part, numbered globally
  HeadRange heads_;         // of this rank: its share of these over ulysses
  std::vector<Layer> layers_;
};

// Tokens of one sequence behind the `cached` positions of a cache, as a batch without targets. `tokens` must outlive it.
class NextTokens {
 public:
  NextTokens(std::span<const std::int32_t> tokens, std::int64_t cached);
  NextTokens(const NextTokens&) = delete;
  NextTokens& operator=(const NextTokens&) = delete;

  const TokenBatch& batch() const { return batch_; }

 private:
  std::vector<std::int64_t> positions_;
  std::vector<std::int32_t> targets_;
  TokenBatch batch_;
};

}  // namespace dattn
