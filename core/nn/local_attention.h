// Attention of a model's layers on one device: the whole sequence is here, rows in order of position.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "core/attention/kernel.h"
#include "core/attention/mask.h"
#include "core/nn/hooks.h"

namespace dattn {

class LocalAttention final : public Attention {
 public:
  // heads: which query heads read which KV heads, for a part of a model; by default the heads of a call are all there
  // are. softmax_scale: by default 1 / sqrt(D). dropout: of calls in training; its stream and batch_begin are the call's.
  explicit LocalAttention(Mask mask, std::optional<HeadMap> heads = {}, std::optional<double> softmax_scale = {},
                          const AttentionDropout& dropout = {});

  Tensor forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) override;
  Gradients backward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& dout) override;
  void drop(int layer) override { saved_.erase(layer); }

 private:
  struct Saved {
    Tensor out, lse;
  };
  const std::vector<Tile>& tiles_of(std::int64_t seq);
  HeadMap heads_of(const TensorView& q, const TensorView& k) const;
  double scale_of(const TensorView& q) const;
  ScoreTerms terms_of(const AttentionSite& site) const;

  Mask mask_;
  std::optional<HeadMap> heads_;
  std::optional<double> scale_;
  AttentionDropout dropout_;
  std::map<std::int64_t, std::vector<Tile>> tiles_;  // by sequence length
  std::map<int, Saved> saved_;                       // by layer
};

}  // namespace dattn
