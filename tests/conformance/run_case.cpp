// One case: the sharded call, forward and backward, against the reference kernel on the whole tensors.
#include <cmath>

#include <fmt/format.h>

#include "core/attention/state.h"
#include "core/base/philox.h"
#include "parallel/comm/decorators.h"
#include "parallel/rank_plan.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/sweep.h"

namespace dattn::conformance {
namespace {

Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t stream) {
  Tensor values(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i)
    values.ptr<float>()[i] = philox_normal(7, stream, static_cast<std::uint64_t>(i));
  return to_dtype(values, dtype);
}

// Rows `rows` and heads `heads` of a whole tensor [B, S, H, X].
Tensor shard_of(const TensorView& whole, const Positions& rows, Interval heads) {
  Tensor part = Tensor::uninitialized(whole.dtype, {whole.size(0), rows.count(), heads.count(), whole.size(3)});
  const std::vector<std::int64_t> list = rows.list();
  for (std::size_t row = 0; row < list.size(); ++row) {
    copy(whole.slice(1, list[row], 1).slice(2, heads.begin, heads.count()), part->slice(1, static_cast<std::int64_t>(row), 1));
  }
  return part;
}

// |got - want| / |want| over all elements, both read as fp64. Where the right answer is (nearly) zero by cancellation, as
// in the gradient of a row that sees one key, the error is relative to a quarter of the size of the terms that cancel.
double relative_error(const TensorView& got, const TensorView& want) {
  const Tensor a = to_dtype(got, DType::kF64), b = to_dtype(want, DType::kF64);
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < a->elements(); ++i) {
    const double x = a.ptr<double>()[i], y = b.ptr<double>()[i];
    if (std::isinf(y) && x == y) continue;
    if (!std::isfinite(x) || !std::isfinite(y)) return INFINITY;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(difference / std::max(norm, 0.0625 * static_cast<double>(std::max<std::int64_t>(1, a->elements()))));
}

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kBF16: return 8e-3;
    case DType::kF64: return 1e-12;
    default: return 2e-6;
  }
}

// The whole problem on one device: query heads of one part of the tensor axis, all KV heads.
struct Expected {
  Tensor q, k, v, dout;
  Tensor out, lse, dq, dk, dv;
  HeadRange heads;
};

Expected reference(const Case& one, const AttentionOptions& options, int tensor_index) {
  const AttentionShape& s = one.shape;
  Expected e;
  e.heads = heads_of(s.heads, s.kv_heads, one.mesh.size(Axis::kTensor), tensor_index);
  e.q = random_tensor(s.dtype, {s.batch, s.seq_q, s.heads, s.dim_qk}, 1);
  e.k = random_tensor(s.dtype, {s.batch, s.seq_kv, s.kv_heads, s.dim_qk}, 2);
  e.v = random_tensor(s.dtype, {s.batch, s.seq_kv, s.kv_heads, s.dim_v}, 3);
  e.dout = random_tensor(s.dtype, {s.batch, s.seq_q, s.heads, s.dim_v}, 4);
  const TensorView q = e.q->slice(2, e.heads.q.begin, e.heads.q.count());
  const TensorView dout = e.dout->slice(2, e.heads.q.begin, e.heads.q.count());
  // In fp64, from the same rounded inputs, whatever the storage type.
  const Tensor q64 = to_dtype(q, DType::kF64), k64 = to_dtype(e.k, DType::kF64), v64 = to_dtype(e.v, DType::kF64),
               dout64 = to_dtype(dout, DType::kF64);
  const CompiledMask mask = compile_batch(options.mask, s.batch, s.seq_q, s.seq_kv);
  const auto tiles = make_tiles(mask, Positions::range(0, s.seq_q), Positions::range(0, s.seq_kv));
  const double scale = 1.0 / std::sqrt(static_cast<double>(s.dim_qk));
  const HeadMap heads{e.heads.q.begin, 0, s.heads / s.kv_heads};
  e.out = Tensor(DType::kF64, dout64->shape);
  e.lse = Tensor(DType::kF64, {s.batch, e.heads.q.count(), s.seq_q});
  clear_state(e.out, e.lse);
  const auto stretch = [](const TensorView& view, const BatchTiles& part) {
    return view.slice(0, part.batch.begin, part.batch.count());
  };
  for (const BatchTiles& part : tiles) {
    reference_kernel().attend({stretch(q64, part), stretch(k64, part), stretch(v64, part), heads, part.tiles, scale,
                               stretch(e.out, part), stretch(e.lse, part), true});
  }
  Tensor delta(DType::kF64, e.lse->shape);
  attention_delta(dout64, e.out, delta);
  e.dq = Tensor(DType::kF64, q64->shape);
  e.dk = Tensor(DType::kF64, k64->shape);
  e.dv = Tensor(DType::kF64, v64->shape);
  for (const BatchTiles& part : tiles) {
    reference_kernel().attend_grad({stretch(q64, part), stretch(k64, part), stretch(v64, part), heads, part.tiles, scale,
                                    stretch(dout64, part), stretch(e.lse, part), stretch(delta, part), stretch(e.dq, part),
                                    stretch(e.dk, part), stretch(e.dv, part)});
  }
  return e;
}

std::string check_bytes(const Plan& plan, int rank, const ByteCounter& counter, const char* which) {
  const RankCost cost = make_rank_plan(plan, rank).cost;
  const std::int64_t counted = counter.total().received;
  if (counted == cost.bytes_received + cost.stats_bytes) return {};
  return fmt::format("{}: the plan says {} bytes and {} of statistics, the transport counted {}\n", which, cost.bytes_received,
                     cost.stats_bytes, counted);
}

std::string check_plan(const Plan& plan, const char* which) {
  std::string all;
  for (const std::string& problem : verify(plan).problems) all += fmt::format("{} plan: {}\n", which, problem);
  return all;
}

}  // namespace

std::string run_case(const Case& one, Communicator& world) {
  const AttentionOptions options = options_of(one);
  const auto counter = std::make_shared<ByteCounter>();
  std::vector<int> everyone(static_cast<std::size_t>(world.size()));
  for (int i = 0; i < world.size(); ++i) everyone[static_cast<std::size_t>(i)] = i;
  const auto counting = counted(world.split(everyone, "conformance"), counter);
  const Mesh mesh(*counting, one.mesh);
  const Expected e = reference(one, options, mesh.coordinate(Axis::kTensor));
  ShardedAttention attention(mesh, one.shape, options);
  const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
  const HeadRange heads = attention.heads();

  const Tensor q = shard_of(e.q, q_rows, heads.q), k = shard_of(e.k, kv_rows, heads.kv), v = shard_of(e.v, kv_rows, heads.kv);
  const Tensor dout = shard_of(e.dout, q_rows, heads.q);
  const Plan forward = make_plan(one.mesh, one.shape, options), gradient = backward(forward);
  std::string problems = world.rank() == 0 ? check_plan(forward, "forward") + check_plan(gradient, "backward") : "";

  counter->reset();
  const AttentionResult result = attention.forward(q, k, v);
  problems += check_bytes(forward, world.rank(), *counter, "forward");
  counter->reset();
  const AttentionGradients gradients = attention.backward(q, k, v, result, dout);
  problems += check_bytes(gradient, world.rank(), *counter, "backward");

  const auto compare = [&](const char* name, const TensorView& got, const TensorView& whole, const Positions& rows,
                           Interval part) {
    const double error = relative_error(got, shard_of(whole, rows, part));
    if (!(error <= tolerance(one.shape.dtype))) problems += fmt::format("{}: relative error {:.3e}\n", name, error);
  };
  const Interval local_q{0, heads.q.count()};
  compare("out", result.out, e.out, q_rows, local_q);
  const TensorView lse_rows(e.lse->data, DType::kF64, e.lse->shape);
  const auto as_rows = [](const TensorView& lse) {  // [B, H, S] seen as [B, S, H, 1]
    TensorView rows = lse.transpose(1, 2);
    rows.shape = Shape{rows.size(0), rows.size(1), rows.size(2), 1};
    rows.strides[3] = 1;
    return rows;
  };
  compare("lse", as_rows(result.lse), as_rows(lse_rows), q_rows, local_q);
  compare("dq", gradients.dq, e.dq, q_rows, local_q);
  compare("dk", gradients.dk, e.dk, kv_rows, heads.kv);
  compare("dv", gradients.dv, e.dv, kv_rows, heads.kv);
  return problems.empty() ? "" : fmt::format("rank {}: {}\n{}", world.rank(), one.text(), problems);
}

}  // namespace dattn::conformance
