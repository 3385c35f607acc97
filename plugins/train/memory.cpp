#include "plugins/train/memory.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/attention/positions.h"
#include "core/nn/transformer.h"

namespace dattn {
namespace {

constexpr std::int64_t kFloat = 4;                // bytes
constexpr std::int64_t kStatistics = 2 * kFloat;  // of a norm, for each row

std::int64_t ups_of(const ModelConfig& model) { return model.activation == "swiglu" ? 2 : 1; }

// Elements of the weights of linear layers, the output layer's among them.
std::int64_t factors_held(const ModelConfig& model, const PartRanges& part) {
  const std::int64_t q = part.heads.count() * model.head_dim, kv = part.kv_heads.count() * model.head_dim;
  const std::int64_t of_block = (2 * q + 2 * kv + (ups_of(model) + 1) * part.hidden.count()) * model.dim;
  return model.layers * of_block + part.vocab.count() * model.dim;
}

std::int64_t elements_held(const ModelConfig& model, const PartRanges& part) {
  const std::int64_t dim = model.dim, biases = model.bias ? 1 : 0, norm = model.norm == "layernorm" ? 2 * dim : dim;
  const std::int64_t q = part.heads.count() * model.head_dim, kv = part.kv_heads.count() * model.head_dim;
  const std::int64_t of_block = biases * (q + 2 * kv + dim + ups_of(model) * part.hidden.count() + dim) + 2 * norm;
  const std::int64_t table = model.tied ? 0 : part.vocab.count() * dim;
  const std::int64_t positions = model.position == "learned" ? model.max_seq * dim : 0;
  return factors_held(model, part) + table + positions + model.layers * of_block + norm;
}

// One rank's sizes in bytes, by the letters of core/nn/transformer.h, e = bytes of the compute type.
struct Sizes {
  std::int64_t residual;    // 4 R M
  std::int64_t stream;      // 4 N M: between enter and leave, in fp32
  std::int64_t operand;     // e N M
  std::int64_t queries;     // e N H D
  std::int64_t keys;        // e N K D
  std::int64_t hidden;      // e N F
  std::int64_t lse;         // 4 N H
  std::int64_t statistics;  // 8 R
  std::int64_t logits;      // of a piece, with its copy in the compute type
  std::int64_t to_float;    // 4 / e
  std::int64_t ups;         // gate and up, or up
  bool gathers;             // sequence parallelism: R < N
};

Sizes sizes_of(const ModelConfig& model, const PartRanges& part, const TrainConfig& train, const MeshShape& mesh, DType dtype) {
  const int tensor = mesh.size(Axis::kTensor);
  const std::int64_t rows = rows_at_a_time(train, mesh.size(Axis::kData)) * div_up(train.seq_len, mesh.sequence_parts());
  const std::int64_t e = size_of(dtype), dim = model.dim, vocab = part.vocab.count();
  Sizes is{};
  is.gathers = train.sequence_parallel && tensor > 1;
  const std::int64_t residual_rows = is.gathers ? div_up(rows, tensor) : rows;
  is.residual = kFloat * residual_rows * dim;
  is.stream = kFloat * rows * dim;
  is.operand = e * rows * dim;
  is.queries = e * rows * part.heads.count() * model.head_dim;
  is.keys = e * rows * part.kv_heads.count() * model.head_dim;
  is.hidden = e * rows * part.hidden.count();
  is.lse = kFloat * rows * part.heads.count();
  is.statistics = kStatistics * residual_rows;
  const std::int64_t widest_vocab = div_up(model.vocab, tensor);
  is.logits = logit_rows(rows, widest_vocab) * vocab * (kFloat + (dtype == DType::kF32 ? 0 : e));
  is.to_float = kFloat / e;
  is.ups = ups_of(model);
  return is;
}

// What a block's forward leaves for its backward (Activations, and what the attention saved: its result, and a copy for the
// block).
std::int64_t attention_half(const Sizes& is) {
  return is.residual + is.statistics + is.operand + is.queries + 2 * is.keys + 2 * is.queries + is.lse;
}
std::int64_t mlp_half(const Sizes& is) { return is.residual + is.statistics + is.operand + is.ups * is.hidden; }

// The most that a block holds beside its input and what earlier blocks keep, in its forward and its backward pass.
std::int64_t block_forward_peak(const Sizes& is, const AttentionPeaks& attention) {
  const std::int64_t in_attention = is.statistics + is.operand + std::max(attention.forward, is.queries + 2 * is.keys);
  const std::int64_t in_mlp =
      attention_half(is) - is.residual + mlp_half(is) + is.hidden + is.stream + (is.gathers ? is.residual : 0);
  return std::max(in_attention, in_mlp);
}

std::int64_t block_backward_peak(const Sizes& is, const AttentionPeaks& attention) {
  const std::int64_t dx = is.residual, dy = is.operand, dh = is.stream, before = attention_half(is) - is.residual;
  const std::int64_t in_mlp = before + mlp_half(is) + dx + dy + is.to_float * is.hidden + dh + (is.ups + 1) * is.hidden;
  // The runner's inputs are what the block and the attention keep.
  const std::int64_t in_runner = is.statistics + is.operand + dx + dy + attention.backward;
  const std::int64_t behind = is.statistics + is.operand + dx + dy + dh + is.to_float * (is.queries + 2 * is.keys) + is.queries;
  return std::max({in_mlp, in_runner, behind});
}

std::int64_t head_peak(const Sizes& is) {
  return is.residual + is.operand + is.stream + is.logits + (is.gathers ? is.residual : 0);
}

TrainingMemory memory_of_part(const ModelConfig& model, const PartRanges& part, const TrainConfig& train, const MeshShape& mesh,
                              DType dtype, Determinism determinism, const AttentionPeaks& attention) {
  const Sizes is = sizes_of(model, part, train, mesh, dtype);
  const bool recomputes = train.recompute == Recompute::kBlock;
  TrainingMemory memory;
  memory.parameters = elements_held(model, part);
  memory.gradients = kFloat * memory.parameters;
  memory.weights = memory.gradients + (dtype == DType::kF32 ? 0 : size_of(dtype) * factors_held(model, part));
  const int sharers = determinism == Determinism::kInvariant ? 1 : mesh.ranks() / mesh.size(Axis::kTensor);
  memory.optimizer = 2 * kFloat * div_up(memory.parameters, sharers);
  const std::int64_t of_block = attention_half(is) + mlp_half(is);
  memory.kept = model.layers * (recomputes ? is.residual : of_block);
  // Without recomputation the last block's activations, which its backward reads, are among those kept.
  const std::int64_t known = recomputes ? 0 : of_block - is.residual;
  const std::int64_t forward = block_forward_peak(is, attention) + (recomputes ? is.residual : 0);  // dx, or the next input
  memory.working = std::max({forward - known, block_backward_peak(is, attention) - known, head_peak(is)});
  return memory;
}

}  // namespace

std::int64_t rows_at_a_time(const TrainConfig& train, int data_ranks) {
  return std::max<std::int64_t>(1, div_up(div_up(train.batch, data_ranks), train.accumulate));
}

TrainingMemory training_memory(const ModelConfig& model, const TrainConfig& train, const MeshShape& mesh, DType dtype,
                               Determinism determinism, const AttentionPeaks& attention) {
  const ModelConfig resolved = resolve(model);
  TrainingMemory most;
  const int parts = mesh.size(Axis::kTensor);
  for (int part = 0; part < parts; ++part) {
    const TrainingMemory one =
        memory_of_part(resolved, ranges_of(resolved, {part, parts}), train, mesh, dtype, determinism, attention);
    if (one.total() > most.total()) most = one;
  }
  return most;
}

std::string text_of(const TrainingMemory& memory, Recompute recompute) {
  const auto gb = [](std::int64_t bytes) { return static_cast<double>(bytes) * 1e-9; };
  return fmt::format(
      "training holds {:.4g} GB on a rank: weights {:.4g}, gradients {:.4g}, optimizer {:.4g}, activations {:.4g} (recompute: "
      "{}), "
      "working memory {:.4g}; and what libraries keep for themselves",
      gb(memory.total()), gb(memory.weights), gb(memory.gradients), gb(memory.optimizer), gb(memory.kept), name_of(recompute),
      gb(memory.working));
}

std::string_view memory_remedies() {
  return "more ranks on mesh.tensor share weights and, with train.sequence_parallel, activations; more on mesh.data, mesh.ring "
         "or "
         "mesh.ulysses share the optimizer's state; more on mesh.ring or mesh.ulysses, train.recompute=block and a greater "
         "train.accumulate lower activations";
}

}  // namespace dattn
