#include "tests/conformance/expected.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include <fmt/format.h>

#include "core/attention/state.h"
#include "core/base/philox.h"
#include "parallel/rank_plan.h"

namespace dattn::conformance {
namespace {

Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t stream) {
  Tensor values(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i)
    values.ptr<float>()[i] = philox_normal(7, stream, static_cast<std::uint64_t>(i));
  return to_dtype(values, dtype);
}

// A view's part of the batch rows of a stretch; what is one for all stays whole.
TensorView cut(const TensorView& view, Interval batch) {
  return view.data == nullptr || view.size(0) == 1 ? view : view.slice(0, batch.begin, batch.count());
}

// Forward and backward of the whole problem by one kernel in one storage type.
Results attend_whole(const AttentionKernel& kernel, DType dtype, const Case& one, const AttentionOptions& options,
                     const Expected& e) {
  const AttentionShape& s = one.shape;
  const Tensor q = to_dtype(e.q->slice(2, e.heads.q.begin, e.heads.q.count()), dtype), k = to_dtype(e.k, dtype),
               v = to_dtype(e.v, dtype), dout = to_dtype(e.dout->slice(2, e.heads.q.begin, e.heads.q.count()), dtype);
  const Tensor bias = s.bias ? to_dtype(bias_part(e.bias, e.heads.q), dtype) : Tensor();
  const TensorView sink = s.sink ? e.sink->slice(0, e.heads.q.begin, e.heads.q.count()) : TensorView();
  const HeadMap heads{e.heads.q.begin, 0, s.heads / s.kv_heads};
  const double scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(s.dim_qk)));
  const auto tiles = make_tiles(compile_batch(options.mask, s.batch, s.seq_q, s.seq_kv), Positions::range(0, s.seq_q),
                                Positions::range(0, s.seq_kv));
  const auto terms_of = [&](Interval batch) {
    const AttentionDropout dropout{options.dropout, options.dropout_seed, kDropoutStream, batch.begin, s.heads};
    return ScoreTerms{options.softcap, options.alibi_slopes, cut(bias, batch), dropout};
  };
  const DType sums = accumulate_type(dtype);
  Results r;
  Tensor state(sums, dout->shape);
  r.lse = Tensor(sums, {s.batch, e.heads.q.count(), s.seq_q});
  clear_state(state, r.lse);
  for (const BatchTiles& part : tiles) {
    kernel.attend({.q = cut(q, part.batch),
                   .k = cut(k, part.batch),
                   .v = cut(v, part.batch),
                   .heads = heads,
                   .tiles = part.tiles,
                   .scale = scale,
                   .out = cut(state, part.batch),
                   .lse = cut(r.lse, part.batch),
                   .merge = true,
                   .terms = terms_of(part.batch)});
  }
  if (s.sink) merge_sink(state, r.lse, sink);
  r.out = to_dtype(state, dtype);
  Tensor delta(sums, r.lse->shape);
  attention_delta(dout, r.out, delta);
  r.dq = Tensor(sums, q->shape);
  r.dk = Tensor(sums, k->shape);
  r.dv = Tensor(sums, v->shape);
  if (s.bias) r.dbias = Tensor(sums, bias->shape);
  for (const BatchTiles& part : tiles) {
    kernel.attend_grad({.q = cut(q, part.batch),
                        .k = cut(k, part.batch),
                        .v = cut(v, part.batch),
                        .heads = heads,
                        .tiles = part.tiles,
                        .scale = scale,
                        .dout = cut(dout, part.batch),
                        .lse = cut(r.lse, part.batch),
                        .delta = cut(delta, part.batch),
                        .dq = cut(r.dq, part.batch),
                        .dk = cut(r.dk, part.batch),
                        .dv = cut(r.dv, part.batch),
                        .terms = terms_of(part.batch),
                        .dbias = cut(r.dbias, part.batch)});
  }
  if (s.sink) {
    r.dsink = Tensor(sums, sink.shape);
    add_sink_gradient(r.lse, delta, sink, r.dsink);
  }
  return r;
}

Expected compute(const Case& one, int tensor_index) {
  const AttentionShape& s = one.shape;
  const AttentionOptions options = options_of(one);
  Expected e;
  e.heads = heads_of(s.heads, s.kv_heads, one.mesh.size(Axis::kTensor), tensor_index);
  e.q = random_tensor(s.dtype, {s.batch, s.seq_q, s.heads, s.dim_qk}, 1);
  e.k = random_tensor(s.dtype, {s.batch, s.seq_kv, s.kv_heads, s.dim_qk}, 2);
  e.v = random_tensor(s.dtype, {s.batch, s.seq_kv, s.kv_heads, s.dim_v}, 3);
  e.dout = random_tensor(s.dtype, {s.batch, s.seq_q, s.heads, s.dim_v}, 4);
  if (s.bias) {
    e.bias = random_tensor(
        s.dtype,
        {s.bias->per_batch ? s.batch : std::min<std::int64_t>(1, s.batch), s.seq_q, s.bias->per_head ? s.heads : 1, s.seq_kv},
        5);
  }
  if (s.sink) e.sink = random_tensor(DType::kF32, {s.heads}, 6);
  e.exact = attend_whole(reference_kernel(), DType::kF64, one, options, e);
  if (s.dtype != DType::kF64) e.one_rank = attend_whole(select_kernel({s.dtype, s.dim_qk, s.dim_v}), s.dtype, one, options, e);
  return e;
}

}  // namespace

std::shared_ptr<const Expected> expected(const Case& one, int tensor_index) {
  struct Slot {
    std::once_flag once;
    std::shared_ptr<const Expected> value;
  };
  constexpr std::size_t kMostSlots = 32;
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<Slot>> slots;
  std::shared_ptr<Slot> slot;
  {
    const std::lock_guard lock(mutex);
    const std::string key = fmt::format("{} part {} of {}", one.problem_text(), tensor_index, one.mesh.size(Axis::kTensor));
    if (slots.size() >= kMostSlots && !slots.count(key)) slots.clear();
    std::shared_ptr<Slot>& found = slots[key];
    if (!found) found = std::make_shared<Slot>();
    slot = found;
  }
  std::call_once(slot->once, [&] { slot->value = std::make_shared<const Expected>(compute(one, tensor_index)); });
  return slot->value;
}

ShardInputs shard_inputs(const Expected& whole, const AttentionShape& shape, Interval batch, const ShardedAttention& attention,
                         Device device) {
  const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
  const HeadRange heads = attention.heads();
  const auto there = [&](const TensorView& tensor) { return to_device(tensor, device); };
  ShardInputs in{.q = there(shard_of(cut(whole.q, batch), q_rows, heads.q)),
                 .k = there(shard_of(cut(whole.k, batch), kv_rows, heads.kv)),
                 .v = there(shard_of(cut(whole.v, batch), kv_rows, heads.kv)),
                 .dout = there(shard_of(cut(whole.dout, batch), q_rows, heads.q)),
                 .bias = {},
                 .sink = {},
                 .call = {.dropout_stream = kDropoutStream, .batch_begin = batch.begin}};
  if (shape.bias) {
    in.bias = there(bias_shard_of(cut(whole.bias, batch), q_rows, heads.q));
    in.call.bias = in.bias;
  }
  if (shape.sink) {
    in.sink = there(whole.sink->slice(0, heads.q.begin, heads.q.count()));
    in.call.sink = in.sink;
  }
  return in;
}

void bring_to_host(AttentionResult& result, AttentionGradients& gradients) {
  for (Tensor* made :
       {&result.out, &result.lse, &gradients.dq, &gradients.dk, &gradients.dv, &gradients.dbias, &gradients.dsink}) {
    if (made->defined() && (*made)->device.is_cuda()) *made = to_device(*made, Device{});
  }
}

TensorView as_rows(const TensorView& lse) {
  TensorView rows = lse.transpose(1, 2);
  rows.shape = Shape{rows.size(0), rows.size(1), rows.size(2), 1};
  rows.strides[3] = 1;
  return rows;
}

Tensor shard_of(const TensorView& whole, const Positions& rows, Interval heads) {
  Tensor part = Tensor::uninitialized(whole.dtype, {whole.size(0), rows.count(), heads.count(), whole.size(3)});
  const std::vector<std::int64_t> list = rows.list();
  for (std::size_t row = 0; row < list.size(); ++row) {
    copy(whole.slice(1, list[row], 1).slice(2, heads.begin, heads.count()), part->slice(1, static_cast<std::int64_t>(row), 1));
  }
  return part;
}

TensorView bias_part(const TensorView& bias, Interval heads) {
  return bias.size(2) == 1 ? bias.slice(2, 0, std::min<std::int64_t>(1, heads.count()))
                           : bias.slice(2, heads.begin, heads.count());
}

Tensor bias_shard_of(const TensorView& bias, const Positions& rows, Interval heads) {
  const TensorView part = bias_part(bias, heads);
  return shard_of(part, rows, {0, part.size(2)});
}

}  // namespace dattn::conformance
