#include "core/nn/transformer.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <utility>

#include "core/base/error.h"
#include "core/nn/block.h"
#include "core/nn/cross_entropy.h"
#include "core/nn/embedding.h"
#include "core/nn/on_cuda.h"
#include "core/nn/rope.h"

namespace dattn {
namespace {

// Whether the residual rows are cut over the parts (sequence parallelism).
bool cuts_rows(const Boundary& boundary, const ModelPart& part) {
  return part.count > 1 && boundary.residual_rows(part.count) < part.count;
}

// Makes the parameters of one part, in order.
class Builder {
 public:
  Builder(const ModelConfig& config, const TransformerOptions& options, const PartRanges& ranges, bool rows_cut)
      : config_(config), options_(options), ranges_(ranges), rows_cut_(rows_cut) {}

  // Cut along an axis in units of `unit` elements of which this part holds `held` (heads, hidden units, tokens).
  Parameter* cut(std::string name, const Shape& global, int axis, std::int64_t unit, Interval held, double deviation) {
    return add(std::move(name), global, axis, {held.begin * unit, held.end * unit}, {held.begin * unit, held.end * unit}, false,
               {Initial::Kind::kNormal, deviation});
  }
  Parameter* cut_bias(std::string name, std::int64_t unit, std::int64_t units, Interval held) {
    return add(std::move(name), {unit * units}, 0, {held.begin * unit, held.end * unit}, {held.begin * unit, held.end * unit},
               false, {Initial::Kind::kConstant, 0.0});
  }
  // Whole on every part; learned in the residual stream.
  Parameter* whole(std::string name, const Shape& global, const Initial& initial) {
    const Interval all{0, global[0]};
    return add(std::move(name), global, 0, all, options_.part.index == 0 ? all : Interval{0, 0}, rows_cut_, initial);
  }
  // A slice of KV heads, which may overlap with the slices of other parts. The first part that holds a head owns it.
  void key_value(const std::string& name, Linear& linear) {
    const std::int64_t unit = config_.head_dim, rows = config_.kv_heads * unit;
    Interval owned = ranges_.kv_heads;
    bool overlap = false;
    for (int index = 0; index < options_.part.count; ++index) {
      const Interval held = ranges_of(config_, {index, options_.part.count}).kv_heads;
      if (index + 1 < options_.part.count) {
        const Interval next = ranges_of(config_, {index + 1, options_.part.count}).kv_heads;
        overlap = overlap || (next.count() > 0 && next.begin < held.end);
      }
      if (index < options_.part.index && held.count() > 0) owned.begin = std::max(owned.begin, held.end);
    }
    owned.begin = std::min(owned.begin, owned.end);
    const Interval held{ranges_.kv_heads.begin * unit, ranges_.kv_heads.end * unit};
    const Interval mine{owned.begin * unit, owned.end * unit};
    linear.weight = add(name + ".weight", {rows, config_.dim}, 0, held, mine, overlap, {Initial::Kind::kNormal, kDeviation});
    if (config_.bias) linear.bias = add(name + ".bias", {rows}, 0, held, mine, overlap, {Initial::Kind::kConstant, 0.0});
  }
  Linear column_cut(const std::string& name, std::int64_t unit, std::int64_t units, Interval held) {
    Linear linear;
    linear.weight = cut(name + ".weight", {unit * units, config_.dim}, 0, unit, held, kDeviation);
    if (config_.bias) linear.bias = cut_bias(name + ".bias", unit, units, held);
    return linear;
  }
  // Onto the residual stream; smaller initial values, as in GPT-2, since 2 * layers of them add up.
  Linear row_cut(const std::string& name, std::int64_t unit, std::int64_t units, Interval held, Parameter*& bias) {
    const double deviation = kDeviation / std::sqrt(2.0 * static_cast<double>(config_.layers));
    Linear linear;
    linear.weight = cut(name + ".weight", {config_.dim, unit * units}, 1, unit, held, deviation);
    if (config_.bias) bias = whole(name + ".bias", {config_.dim}, {Initial::Kind::kConstant, 0.0});
    return linear;
  }
  Norm norm(const std::string& name) {
    Norm made;
    made.centered = config_.norm == "layernorm";
    made.epsilon = static_cast<float>(config_.norm_epsilon);
    made.weight = whole(name + ".weight", {config_.dim}, {Initial::Kind::kConstant, 1.0});
    if (made.centered) made.bias = whole(name + ".bias", {config_.dim}, {Initial::Kind::kConstant, 0.0});
    return made;
  }

  static constexpr double kDeviation = 0.02;  // GPT-2's
  std::deque<Parameter> parameters;           // addresses are stable

 private:
  Parameter* add(std::string name, const Shape& global, int axis, Interval held, Interval owned, bool sum_over_tensor,
                 const Initial& initial) {
    Parameter& made = parameters.emplace_back();
    made.name = std::move(name);
    made.global_shape = global;
    made.cut_axis = axis;
    made.held = held;
    made.owned = owned;
    made.decays = global.axes == 2;
    made.sum_over_tensor = sum_over_tensor;
    Shape local = global;
    local[axis] = held.count();
    made.value = Tensor(DType::kF32, local);
    made.gradient = Tensor(DType::kF32, local);
    initialize(made, initial, options_.seed);
    return &made;
  }

  const ModelConfig& config_;
  const TransformerOptions& options_;
  const PartRanges& ranges_;
  bool rows_cut_;
};

TransformerBlock build_block(Builder& builder, const ModelConfig& config, const PartRanges& ranges, std::int64_t layer) {
  const std::string name = "blocks." + std::to_string(layer) + ".";
  TransformerBlock block;
  block.attention_norm = builder.norm(name + "attention.norm");
  block.q = builder.column_cut(name + "attention.q", config.head_dim, config.heads, ranges.heads);
  builder.key_value(name + "attention.k", block.k);
  builder.key_value(name + "attention.v", block.v);
  block.out = builder.row_cut(name + "attention.out", config.head_dim, config.heads, ranges.heads, block.out_bias);
  block.mlp_norm = builder.norm(name + "mlp.norm");
  if (config.activation == "swiglu") block.gate = builder.column_cut(name + "mlp.gate", 1, config.hidden, ranges.hidden);
  block.up = builder.column_cut(name + "mlp.up", 1, config.hidden, ranges.hidden);
  block.down = builder.row_cut(name + "mlp.down", 1, config.hidden, ranges.hidden, block.down_bias);
  return block;
}

}  // namespace

Recompute recompute_from(std::string_view name) {
  require(name == "none" || name == "block", "train.recompute is '{}'; it is one of none, block", name);
  return name == "block" ? Recompute::kBlock : Recompute::kNone;
}

std::string_view name_of(Recompute recompute) { return recompute == Recompute::kBlock ? "block" : "none"; }

std::int64_t logit_rows(std::int64_t rows, std::int64_t vocab, std::int64_t logits_at_a_time) {
  const std::int64_t most = std::max<std::int64_t>(1, logits_at_a_time / vocab);
  return div_up(rows, std::max<std::int64_t>(1, div_up(rows, most)));
}

PartRanges ranges_of(const ModelConfig& resolved, const ModelPart& part) {
  PartRanges ranges;
  ranges.heads = split_evenly(resolved.heads, part.count, part.index);
  const std::int64_t group = resolved.heads / resolved.kv_heads;
  ranges.kv_heads = {ranges.heads.begin / group, (ranges.heads.end + group - 1) / group};
  if (ranges.heads.count() == 0) ranges.kv_heads.end = ranges.kv_heads.begin;
  ranges.hidden = split_evenly(resolved.hidden, part.count, part.index);
  ranges.vocab = split_evenly(resolved.vocab, part.count, part.index);
  return ranges;
}

struct Transformer::Impl {
  ModelConfig config;
  TransformerOptions options;
  Attention& attention;
  Boundary& boundary;
  VocabularyReduction& vocabulary;
  PartRanges ranges;
  std::deque<Parameter> storage;
  std::vector<Parameter*> parameters;
  Parameter* token_table = nullptr;     // [V, M]
  Parameter* position_table = nullptr;  // [max_seq, M]; learned positions only
  std::vector<TransformerBlock> blocks;
  Norm norm;
  Linear output;  // [V, M]; the token table when tied
  bool frozen = false;

  Impl(const ModelConfig& c, const TransformerOptions& o, Attention& a, Boundary& b, VocabularyReduction& v)
      : config(resolve(c)), options(o), attention(a), boundary(b), vocabulary(v), ranges(ranges_of(config, o.part)) {
    ensure(o.part.index >= 0 && o.part.index < o.part.count, "model part {} of {}", o.part.index, o.part.count);
    require(o.compute == DType::kF32 || is_half(o.compute), "a transformer computes in fp32, bf16 or fp16, not {}",
            name_of(o.compute));
    Builder builder(config, options, ranges, cuts_rows(boundary, o.part));
    token_table = builder.cut("embedding.token.weight", {config.vocab, config.dim}, 0, 1, ranges.vocab, Builder::kDeviation);
    if (config.position == "learned") {
      position_table = builder.whole("embedding.position.weight", {config.max_seq, config.dim},
                                     {Initial::Kind::kNormal, Builder::kDeviation});
    }
    for (std::int64_t i = 0; i < config.layers; ++i) blocks.push_back(build_block(builder, config, ranges, i));
    norm = builder.norm("norm");
    output.weight = config.tied
                        ? token_table
                        : builder.cut("output.weight", {config.vocab, config.dim}, 0, 1, ranges.vocab, Builder::kDeviation);
    storage = std::move(builder.parameters);
    ensure(o.leaves == 0 || o.part.count == 1, "sums in the order of a tree with {} model parts", o.part.count);
    if (o.leaves > 0 && config.tied) token_table->gradient2 = Tensor(DType::kF32, token_table->value->shape);
    for (Parameter& parameter : storage) parameters.push_back(&parameter);
    for (const TransformerBlock& block : blocks) {
      for (const Linear& linear : {block.q, block.k, block.v, block.out, block.gate, block.up, block.down}) {
        if (linear.weight != nullptr) linear.weight->factor = true;
      }
    }
    output.weight->factor = true;
  }

  void check(const TokenBatch& batch) const;
  Pass begin(const TokenBatch& batch, bool train) const;
  void round_weights() const;
  void zero_gradients(bool factors) const;
  Tensor embed(const TokenBatch& batch, const Pass& pass) const;
  Tensor blocks_without_gradient(const Pass& pass, Tensor x) const;
  Tensor enter_head(const Pass& pass, const TensorView& x, Tensor& stats) const;
  double head(const TokenBatch& batch, const Pass& pass, const TensorView& h, const TensorView& dh) const;
  double head_by_tree(const TokenBatch& batch, const RowTree& tree, const TensorView& h, const TensorView& dh) const;
  template <class Weights>
  double head_piece(const TokenBatch& batch, Interval rows, const TensorView& h, const TensorView& dh, const RowTree& tree,
                    const Weights& weights) const;
  double forward_backward(const TokenBatch& batch) const;
  void embed_backward(const TokenBatch& batch, const Pass& pass, Tensor dx) const;
};

void Transformer::Impl::check(const TokenBatch& batch) const {
  const auto seq = static_cast<std::int64_t>(batch.positions.size());
  ensure(static_cast<std::int64_t>(batch.tokens.size()) == batch.batch * seq, "{} tokens for {} rows of {} positions",
         batch.tokens.size(), batch.batch, seq);
  for (const std::int32_t token : batch.tokens) {
    require(token >= 0 && token < config.vocab, "token {} is outside the vocabulary of {}; use the tokenizer of this model",
            token, config.vocab);
  }
  for (const std::int32_t target : batch.targets) {
    require(target >= -1 && target < config.vocab, "target {} is outside the vocabulary of {} (-1 = no loss)", target,
            config.vocab);
  }
  if (position_table == nullptr) return;
  for (const std::int64_t position : batch.positions) {
    require(position >= 0 && position < config.max_seq,
            "position {} is not learned: model.max_seq is {}; use shorter sequences, or model.position rope", position,
            config.max_seq);
  }
}

Pass Transformer::Impl::begin(const TokenBatch& batch, bool train) const {
  check(batch);
  if (!frozen) round_weights();
  Pass pass(attention, boundary);
  pass.batch = batch.batch;
  pass.seq = static_cast<std::int64_t>(batch.positions.size());
  pass.head_dim = config.head_dim;
  pass.compute = options.compute;
  const std::int64_t rows = pass.batch * pass.seq;
  pass.rows = {boundary.residual_begin(rows), boundary.residual_rows(rows), batch.positions, batch.batch_begin};
  if (options.leaves > 0) {
    ensure(batch.batch == 1, "sums in the order of a tree over {} batch rows", batch.batch);
    pass.rows.tree = folded_rows(rows, options.leaves);
  }
  pass.dropout = {train ? config.dropout : 0.0, options.seed, batch.step, 0};
  pass.site = {0, train, batch.step * static_cast<std::uint64_t>(config.layers), batch.batch_begin};
  if (current_device().is_cuda() && pass.dropout.p > 0) {
    pass.positions = to_device(batch.positions);
    pass.rows.on_device = pass.positions.ptr<std::int64_t>();
  }
  if (config.position == "rope") pass.rope = rope_table(batch.positions, config.head_dim, config.rope_base);
  return pass;
}

// Products read weights in their own type: rounded once a pass, not at each product.
void Transformer::Impl::round_weights() const {
  if (options.compute == DType::kF32) return;
  for (Parameter* parameter : parameters) {
    if (!parameter->factor) continue;
    parameter->rounded = {};  // its memory serves the next one
    as_compute(parameter->value, options.compute, parameter->rounded);
  }
}

void Transformer::Impl::zero_gradients(bool factors) const {
  for (Parameter* parameter : parameters) {
    if (factors || !parameter->factor) fill_zero(parameter->gradient);
    if (parameter->gradient2.defined()) fill_zero(parameter->gradient2);
  }
}

// tokens [N] -> x [R, M]
Tensor Transformer::Impl::embed(const TokenBatch& batch, const Pass& pass) const {
  Tensor x = boundary.leave(embedding_forward(*token_table, batch.tokens), pass.batch * pass.seq);
  if (position_table != nullptr) position_forward(*position_table, pass.rows, x);
  dropout_apply(pass.dropout, pass.rows, x);
  return x;
}

void Transformer::Impl::embed_backward(const TokenBatch& batch, const Pass& pass, Tensor dx) const {
  dropout_apply(pass.dropout, pass.rows, dx);
  if (position_table != nullptr) position_backward(*position_table, pass.rows, dx);
  embedding_backward(*token_table, batch.tokens, boundary.leave_backward(std::move(dx), pass.batch * pass.seq), pass.rows.tree);
}

Tensor Transformer::Impl::blocks_without_gradient(const Pass& pass, Tensor x) const {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    Activations keep;
    x = block_forward(blocks[i], static_cast<int>(i), pass, std::move(x), keep);
    attention.drop(static_cast<int>(i));
  }
  return x;
}

// x [R, M] -> final norm -> [N, M] in the compute type
Tensor Transformer::Impl::enter_head(const Pass& pass, const TensorView& x, Tensor& stats) const {
  stats = Tensor::uninitialized(DType::kF32, {x.size(0), 2});
  return boundary.enter(norm_forward(norm, x, stats, options.compute), pass.batch * pass.seq);
}

// h [N, M] -> the loss; with dh [N, M] fp32, its gradient too. By pieces of the rows, so that logits [n, V] stay within
// logits_at_a_time; the pieces are equal on every part.
double Transformer::Impl::head(const TokenBatch& batch, const Pass& pass, const TensorView& h, const TensorView& dh) const {
  if (!pass.rows.tree.empty()) return head_by_tree(batch, pass.rows.tree, h, dh);
  const std::int64_t widest = split_evenly(config.vocab, options.part.count, 0).count();
  const std::int64_t piece = logit_rows(h.size(0), widest, options.logits_at_a_time);
  double total = 0.0;
  for (std::int64_t begin = 0; begin < h.size(0); begin += piece) {
    const Interval rows{begin, std::min(begin + piece, h.size(0))};
    const bool accumulate = !pass.first || begin > 0;
    total += head_piece(batch, rows, h, dh, {}, [&](const TensorView& x, const TensorView& dlogits) {
      linear_backward_weights(output, x, dlogits, {}, accumulate);
    });
  }
  return total;
}

// The pieces are the leaves of a tree.
double Transformer::Impl::head_by_tree(const TokenBatch& batch, const RowTree& tree, const TensorView& h,
                                       const TensorView& dh) const {
  std::vector<double> losses(tree.leaves.size());
  const auto leaf = [&](std::size_t i, const TensorView& to, bool accumulate) {
    const Interval rows = tree.leaves[i];
    losses[i] = head_piece(batch, rows, h, dh, RowTree{{{0, rows.count()}}},
                           [&](const TensorView& x, const TensorView& dlogits) { leaf_product(dlogits, x, to, accumulate); });
  };
  if (dh.data != nullptr) {
    const Tensor total = Tensor::uninitialized(DType::kF32, output.weight->gradient->shape);
    tree_sum(0, losses.size(), total, leaf);
    add_contiguous(total, output.weight->gradient);
  } else {
    for (std::size_t i = 0; i < losses.size(); ++i) leaf(i, {}, false);
  }
  return tree_sum(losses);
}

// Some rows' loss. With dh, their rows of it; weights(x, dlogits) is to add to the gradient of the output layer.
template <class Weights>
double Transformer::Impl::head_piece(const TokenBatch& batch, Interval rows, const TensorView& h, const TensorView& dh,
                                     const RowTree& tree, const Weights& weights) const {
  const bool gradient = dh.data != nullptr;
  const TensorView x = h.slice(0, rows.begin, rows.count());
  Tensor logits = linear_forward(output, x, DType::kF32, tree);  // [n, V]
  const auto targets = batch.targets.subspan(static_cast<std::size_t>(rows.begin), static_cast<std::size_t>(rows.count()));
  const double scale = gradient ? batch.gradient_scale : 1.0;
  const double loss =
      cross_entropy(logits, ranges.vocab.begin, targets, batch.loss_scale * scale, vocabulary, gradient) / scale;
  if (!gradient) return loss;
  const Tensor dlogits = to_compute(std::move(logits), options.compute);
  weights(x, dlogits);
  linear_backward_input(output, dlogits, dh.slice(0, rows.begin, rows.count()), false, tree);
  return loss;
}

double Transformer::Impl::forward_backward(const TokenBatch& batch) const {
  ensure(batch.targets.size() == batch.tokens.size(), "{} targets for {} tokens", batch.targets.size(), batch.tokens.size());
  Pass pass = begin(batch, true);
  pass.first = batch.first && pass.rows.tree.empty() && !batch.tokens.empty();
  if (batch.first) zero_gradients(!pass.first);
  const bool recompute = options.recompute == Recompute::kBlock;
  std::vector<Activations> kept(blocks.size());
  Tensor x = embed(batch, pass);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    x = block_forward(blocks[i], static_cast<int>(i), pass, std::move(x), kept[i]);
    if (!recompute) continue;
    Activations input;
    input.x0 = std::move(kept[i].x0);
    kept[i] = std::move(input);
    attention.drop(static_cast<int>(i));
  }

  Tensor stats;
  Tensor h = enter_head(pass, x, stats);
  Tensor dh = Tensor::uninitialized(DType::kF32, h->shape);
  const double loss = head(batch, pass, h, dh);
  h = {};
  Tensor dx(DType::kF32, x->shape);
  norm_backward(norm, x, stats, boundary.enter_backward(std::move(dh), pass.batch * pass.seq), dx, pass.rows.tree);
  x = {};

  for (std::size_t i = blocks.size(); i-- > 0;) {
    if (recompute) block_forward(blocks[i], static_cast<int>(i), pass, std::move(kept[i].x0), kept[i]);
    block_backward(blocks[i], static_cast<int>(i), pass, kept[i], dx);
  }
  embed_backward(batch, pass, std::move(dx));
  return loss;
}

Transformer::Transformer(const ModelConfig& config, const TransformerOptions& options, Attention& attention, Boundary& boundary,
                         VocabularyReduction& vocabulary)
    : impl_(std::make_unique<Impl>(config, options, attention, boundary, vocabulary)) {}
Transformer::~Transformer() = default;
Transformer::Transformer(Transformer&&) noexcept = default;

const ModelConfig& Transformer::config() const { return impl_->config; }
const PartRanges& Transformer::ranges() const { return impl_->ranges; }
std::span<Parameter* const> Transformer::parameters() const { return impl_->parameters; }

Parameter& Transformer::parameter(std::string_view name) const {
  for (Parameter* parameter : impl_->parameters) {
    if (parameter->name == name) return *parameter;
  }
  fail(ErrorCode::kBadInput, "the model has no parameter '{}'; its first is '{}' and its last '{}'", name,
       impl_->parameters.front()->name, impl_->parameters.back()->name);
}

void Transformer::zero_gradients() { impl_->zero_gradients(true); }

void Transformer::freeze() {
  impl_->round_weights();
  impl_->frozen = true;
}

double Transformer::forward_backward(const TokenBatch& batch) { return impl_->forward_backward(batch); }

double Transformer::loss(const TokenBatch& batch) {
  ensure(batch.targets.size() == batch.tokens.size(), "{} targets for {} tokens", batch.targets.size(), batch.tokens.size());
  const Pass pass = impl_->begin(batch, false);
  const Tensor x = impl_->blocks_without_gradient(pass, impl_->embed(batch, pass));
  Tensor stats;
  return impl_->head(batch, pass, impl_->enter_head(pass, x, stats), {});
}

Tensor Transformer::logits(const TokenBatch& batch, std::span<const std::int64_t> rows) {
  const Pass pass = impl_->begin(batch, false);
  const Tensor x = impl_->blocks_without_gradient(pass, impl_->embed(batch, pass));
  Tensor stats;
  const Tensor h = impl_->enter_head(pass, x, stats);  // [N, M]
  Tensor chosen = Tensor::uninitialized(h->dtype, {static_cast<std::int64_t>(rows.size()), h->size(1)});
  for (std::size_t i = 0; i < rows.size(); ++i) {
    ensure(rows[i] >= 0 && rows[i] < h->size(0), "logits of token row {} of {}", rows[i], h->size(0));
    copy(h->slice(0, rows[i], 1), chosen->slice(0, static_cast<std::int64_t>(i), 1));
  }
  return linear_forward(impl_->output, chosen, DType::kF32);
}

}  // namespace dattn
