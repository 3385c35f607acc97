// One optimizer step (see train_step.h).
#include "plugins/train/train_step.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/nn/row_tree.h"
#include "parallel/invariant_sync.h"
#include "parallel/strategy.h"
#include "plugins/train/invariant.h"

namespace dattn {
namespace {

AttentionShape attention_shape(const TrainJob& job, const ModelConfig& model) {
  return {.batch = 1,
          .seq_q = job.train.seq_len,
          .seq_kv = job.train.seq_len,
          .heads = model.heads,
          .kv_heads = model.kv_heads,
          .dim_qk = model.head_dim,
          .dim_v = model.head_dim,
          .dtype = job.dtype};
}

AttentionOptions attention_options(const TrainJob& job) {
  return {.mask = to_mask(job.attention.mask, job.train.seq_len, job.train.seq_len),
          .softmax_scale = job.attention.softmax_scale,
          .layout = job.layout,
          .strategy = job.strategy,
          .determinism = job.determinism,
          .softcap = job.attention.softcap.value_or(0),
          .alibi_slopes = job.attention.alibi_slopes.value_or(std::vector<double>{}),
          .dropout = job.attention.dropout.p,
          .dropout_seed = static_cast<std::uint64_t>(job.attention.dropout.seed)};
}

// Which positions this rank holds, by the layout and, where that looks at it, the mask.
Positions own_positions(const Mesh& mesh, const TrainJob& job) {
  const AttentionShape shape{.seq_q = job.train.seq_len, .seq_kv = job.train.seq_len};
  const AttentionOptions options{.mask = attention_options(job).mask, .layout = job.layout};
  return make_problem(mesh.shape(), shape, options)->shard_rows(false, mesh.rank());
}

std::unique_ptr<Boundary> make_boundary(const Mesh& mesh, bool sequence_parallel) {
  Communicator& tensor = mesh.axis(Axis::kTensor);
  if (sequence_parallel) return std::make_unique<SequenceBoundary>(tensor);
  return std::make_unique<TensorBoundary>(tensor);
}

TransformerOptions transformer_options(const Mesh& mesh, const TrainJob& job) {
  return {.part = {mesh.coordinate(Axis::kTensor), mesh.shape().size(Axis::kTensor)},
          .compute = job.dtype,
          .recompute = job.train.recompute,
          .seed = static_cast<std::uint64_t>(job.train.seed),
          .leaves = job.invariant() ? kLeaves / mesh.shape().sequence_parts() : 0};
}

const ModelConfig& with_room_for(const TrainJob& job, const ModelConfig& model) {
  require(model.position != "learned" || job.train.seq_len <= model.max_seq,
          "train.seq_len is {} but model.max_seq has {} learned positions; raise model.max_seq or use model.position=rope",
          job.train.seq_len, model.max_seq);
  return model;
}

std::unique_ptr<GradientSync> make_sync(const Mesh& mesh, const TrainJob& job, std::span<Parameter* const> parameters) {
  if (job.invariant()) return std::make_unique<InvariantGradientSync>(mesh, parameters, job.train.batch);
  return std::make_unique<GradientSync>(mesh, parameters);
}

}  // namespace

void require_trainable(const TrainJob& job) {
  if (job.invariant()) require_invariant(job);
  const std::int64_t calls = job.train.steps * job.model.layers;
  require(job.attention.dropout.p == 0 || calls < std::int64_t{1} << 32,
          "attention.dropout has room for 2^32 calls of attention, train.steps {} x model.layers {} are {}; train fewer steps, "
          "or set model.dropout in its place",
          job.train.steps, job.model.layers, calls);
}

TrainStep::TrainStep(Communicator& world, const ByteCounter& counter, const Mesh& mesh, const TrainJob& job,
                     const ModelConfig& model)
    : world_(world),
      counter_(counter),
      mesh_(mesh),
      job_(job),
      share_(mesh, own_positions(mesh, job), job.train.seq_len),
      boundary_(make_boundary(mesh, job.train.sequence_parallel)),
      vocabulary_(mesh.axis(Axis::kTensor)),
      attention_(mesh, attention_shape(job, model), attention_options(job)),
      transformer_(with_room_for(job, model), transformer_options(mesh, job), attention_, *boundary_, vocabulary_),
      gradients_(make_sync(mesh, job, transformer_.parameters())),
      optimizer_(gradients_->own(), {.beta1 = job.train.beta1,
                                     .beta2 = job.train.beta2,
                                     .epsilon = job.train.epsilon,
                                     .weight_decay = job.train.weight_decay}),
      loss_scale_(job.train.loss_scale, job.dtype) {}

std::int64_t TrainStep::pieces_of(std::int64_t rows, std::int64_t pieces) const {
  return job_.invariant() ? std::max<std::int64_t>(1, share_.rows(rows).count()) : pieces;
}

std::array<double, 3> TrainStep::sum_over_world(LossSum& loss, const std::array<double, 3>& others) {
  const std::span<double> places = loss.places();
  std::vector<double> sums(places.begin(), places.end());
  sums.insert(sums.end(), others.begin(), others.end());
  const auto count = static_cast<std::int64_t>(sums.size());
  world_.all_reduce_sum(TensorView(sums.data(), DType::kF64, {count}), {.verb = "step_sums"});
  std::copy_n(sums.begin(), places.size(), places.begin());
  return {sums[places.size()], sums[places.size() + 1], sums[places.size() + 2]};
}

StepSums TrainStep::forward_backward(std::int64_t step, const BatchShare::Window& window, const Gradients& before_sum) {
  const WorkSpan span(world_.trace(), {"forward_backward", -1, static_cast<int>(step)});
  const std::int64_t sent_before = counter_.total().sent;
  bool first = true;
  LossSum loss(mesh_, job_.invariant(), job_.train.batch);
  share_.for_each_piece(job_.train.batch, pieces_of(job_.train.batch, job_.train.accumulate), [&](Interval rows) {
    TokenBatch batch = share_.tokens(rows, window);
    batch.step = static_cast<std::uint64_t>(step);
    batch.loss_scale = 1.0 / static_cast<double>(job_.train.batch * job_.train.seq_len);
    batch.gradient_scale = loss_scale_.scale();
    batch.first = std::exchange(first, false);
    loss.add(rows, transformer_.forward_backward(batch));
    gradients_->piece_done();
  });
  if (first) transformer_.zero_gradients();  // no rows on this rank
  if (before_sum) before_sum(transformer_.parameters());
  gradients_->sum();
  const auto sent = static_cast<double>(counter_.total().sent - sent_before);
  const auto values = static_cast<double>(gradients_->shares().values_sent());
  const std::array<double, 3> others = sum_over_world(loss, {gradients_->squared_norm_share(), sent, values});
  return {loss.total(), std::sqrt(others[0]) / loss_scale_.scale(), static_cast<std::int64_t>(others[1]),
          static_cast<std::int64_t>(others[2])};
}

Update TrainStep::update(double rate, const StepSums& sums) {
  const WorkSpan span(world_.trace(), {"update"});
  if (!std::isfinite(sums.loss)) return Update::kDiverged;
  if (!std::isfinite(sums.grad_norm)) {
    return loss_scale_.on() && loss_scale_.step_skipped() ? Update::kOverflowed : Update::kDiverged;
  }
  optimizer_.step(rate, clip_factor(sums.grad_norm, job_.train.clip_norm) / loss_scale_.scale());
  gradients_->gather_values();
  loss_scale_.step_taken();
  return Update::kTaken;
}

double TrainStep::loss(std::int64_t rows, const BatchShare::Window& window) {
  const std::int64_t pieces = (rows + job_.train.batch - 1) / job_.train.batch * job_.train.accumulate;
  LossSum loss(mesh_, job_.invariant(), rows);
  share_.for_each_piece(rows, pieces_of(rows, pieces), [&](Interval piece) {
    TokenBatch tokens = share_.tokens(piece, window);
    tokens.loss_scale = 1.0 / static_cast<double>(rows * job_.train.seq_len);
    loss.add(piece, transformer_.loss(tokens));
  });
  sum_over_world(loss, {});
  return loss.total();
}

}  // namespace dattn
