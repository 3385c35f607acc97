#include "core/nn/local_attention.h"

#include <cmath>
#include <utility>

#include "core/attention/state.h"
#include "core/base/error.h"

namespace dattn {

LocalAttention::LocalAttention(Mask mask, std::optional<HeadMap> heads, std::optional<double> softmax_scale,
                               const AttentionDropout& dropout)
    : mask_(std::move(mask)), heads_(heads), scale_(softmax_scale), dropout_(dropout) {}

const std::vector<Tile>& LocalAttention::tiles_of(std::int64_t seq) {
  auto found = tiles_.find(seq);
  if (found == tiles_.end()) {
    const Positions all = Positions::range(0, seq);
    found = tiles_.emplace(seq, make_tiles(compile(mask_, seq, seq), all, all)).first;
  }
  return found->second;
}

HeadMap LocalAttention::heads_of(const TensorView& q, const TensorView& k) const {
  if (heads_) return *heads_;
  return {0, 0, k.size(2) == 0 ? 1 : q.size(2) / k.size(2)};
}

double LocalAttention::scale_of(const TensorView& q) const {
  return scale_.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
}

ScoreTerms LocalAttention::terms_of(const AttentionSite& site) const {
  ScoreTerms terms;
  if (!site.training) return terms;
  terms.dropout = dropout_;
  terms.dropout.stream = site.dropout_stream;
  terms.dropout.batch_begin = site.batch_begin;
  return terms;
}

Tensor LocalAttention::forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) {
  const DType sums = accumulate_type(q.dtype);
  Tensor out(sums, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse(sums, {q.size(0), q.size(2), q.size(1)});
  if (q.elements() > 0) {
    select_kernel({q.dtype, q.size(3), v.size(3), q.device})
        .attend({.q = q,
                 .k = k,
                 .v = v,
                 .heads = heads_of(q, k),
                 .tiles = tiles_of(q.size(1)),
                 .scale = scale_of(q),
                 .out = out,
                 .lse = lse,
                 .terms = terms_of(site)});
  }
  Tensor result = to_dtype(out, q.dtype);
  saved_[site.layer] = {sums == q.dtype ? std::move(out) : result.clone(), std::move(lse)};
  return result;
}

Attention::Gradients LocalAttention::backward(const AttentionSite& site, const TensorView& q, const TensorView& k,
                                              const TensorView& v, const TensorView& dout) {
  const auto found = saved_.find(site.layer);
  ensure(found != saved_.end(), "attention backward of layer {} without its forward", site.layer);
  const Saved saved = std::move(found->second);
  saved_.erase(found);
  const DType sums = accumulate_type(q.dtype);
  Gradients gradients{Tensor(sums, q.shape), Tensor(sums, k.shape), Tensor(sums, v.shape)};
  if (q.elements() == 0) return gradients;
  Tensor delta(sums, saved.lse->shape);
  attention_delta(dout, saved.out, delta);
  select_kernel({q.dtype, q.size(3), v.size(3), q.device})
      .attend_grad({.q = q,
                    .k = k,
                    .v = v,
                    .heads = heads_of(q, k),
                    .tiles = tiles_of(q.size(1)),
                    .scale = scale_of(q),
                    .dout = dout,
                    .lse = saved.lse,
                    .delta = delta,
                    .dq = gradients.dq,
                    .dk = gradients.dk,
                    .dv = gradients.dv,
                    .terms = terms_of(site)});
  return gradients;
}

}  // namespace dattn
