// The training loop (see trainer.h).
#include "plugins/train/trainer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numbers>
#include <optional>

#include "core/base/error.h"
#include "core/nn/optimizer.h"
#include "core/nn/row_tree.h"
#include "core/nn/transformer.h"
#include "parallel/attention.h"
#include "parallel/comm/decorators.h"
#include "parallel/data_parallel.h"
#include "parallel/invariant_sync.h"
#include "parallel/sequence_parallel.h"
#include "parallel/strategy.h"
#include "parallel/tensor_parallel.h"
#include "plugins/infer/generate.h"
#include "plugins/train/batch_share.h"
#include "plugins/train/invariant.h"
#include "plugins/train/loss_scale.h"
#include "plugins/train/loss_sum.h"
#include "plugins/train/model_state.h"
#include "plugins/train/ngram.h"
#include "plugins/train/text_data.h"
#include "plugins/train/together.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

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

bool invariant(const TrainJob& job) { return job.determinism == Determinism::kInvariant; }

// What can be refused before any work.
const TrainJob& checked(const TrainJob& job) {
  if (invariant(job)) require_invariant(job);
  const std::int64_t calls = job.train.steps * job.model.layers;
  require(job.attention.dropout.p == 0 || calls < std::int64_t{1} << 32,
          "attention.dropout has room for 2^32 calls of attention, train.steps {} x model.layers {} are {}; train fewer steps, "
          "or set model.dropout in its place",
          job.train.steps, job.model.layers, calls);
  return job;
}

// Which positions this rank holds, by the layout and, where that looks at it, the mask.
Positions own_positions(const Mesh& mesh, const TrainJob& job) {
  const AttentionShape shape{.seq_q = job.train.seq_len, .seq_kv = job.train.seq_len};
  const AttentionOptions options{.mask = attention_options(job).mask, .layout = job.layout};
  return make_problem(mesh.shape(), shape, options)->shard_rows(false, mesh.rank());
}

Schedule schedule_of(const TrainConfig& train) {
  Schedule schedule;
  for (const auto& [name, kind] : ConfigNames<ScheduleKind>::kAll) {
    if (kind == train.schedule) schedule.kind = name;
  }
  schedule.peak = train.learning_rate;
  schedule.floor = train.min_learning_rate;
  schedule.warmup = train.warmup_steps;
  schedule.steps = train.steps;
  return schedule;
}

// A model spread over the mesh, with the hooks it calls.
struct MeshModel {
  std::unique_ptr<Boundary> boundary;
  TensorVocabularyReduction vocabulary;
  DistributedAttention attention;
  Transformer transformer;

  MeshModel(const Mesh& mesh, const TrainJob& job, const ModelConfig& model)
      : boundary(make_boundary(mesh, job.train.sequence_parallel)),
        vocabulary(mesh.axis(Axis::kTensor)),
        attention(mesh, attention_shape(job, model), attention_options(job)),
        transformer(model,
                    {.part = {mesh.coordinate(Axis::kTensor), mesh.shape().size(Axis::kTensor)},
                     .compute = job.dtype,
                     .recompute = job.train.recompute,
                     .seed = static_cast<std::uint64_t>(job.train.seed),
                     .leaves = invariant(job) ? kLeaves / mesh.shape().sequence_parts() : 0},
                    attention, *boundary, vocabulary) {}

  static std::unique_ptr<Boundary> make_boundary(const Mesh& mesh, bool sequence_parallel) {
    Communicator& tensor = mesh.axis(Axis::kTensor);
    if (sequence_parallel) return std::make_unique<SequenceBoundary>(tensor);
    return std::make_unique<TensorBoundary>(tensor);
  }
};

class Trainer {
 public:
  Trainer(Communicator& world, const TrainJob& job, const TrainHooks& hooks);
  TrainResult run();

 private:
  struct StepSums {
    double loss = 0;         // nats per symbol
    double grad_norm = 0;    // taken back to size
    std::int64_t bytes = 0;  // sent by all ranks
  };

  bool first() const { return world_->rank() == 0; }
  void open_run_folder();
  void load_data();
  void build_model();
  void restore();
  // Into how many pieces this rank's rows of a batch are cut, if not by its invariance.
  std::int64_t pieces_of(std::int64_t rows, std::int64_t pieces) const {
    return invariant(job_) ? std::max<std::int64_t>(1, share_.rows(rows).count()) : pieces;
  }
  StepSums forward_backward(std::int64_t step);
  std::array<double, 2> sum_over_world(LossSum& loss, const std::array<double, 2>& others);
  // Whether the optimizer may step; false where fp16's gradients overflowed, and the loss scale fell for that.
  bool may_step(std::int64_t step, const StepSums& sums, double rate);
  void step(std::int64_t step);
  double evaluate();
  void save(std::int64_t steps_done);
  void write_sample();
  void count_ngrams();

  const TrainJob& job_;
  const TrainHooks& hooks_;
  Clock::time_point start_ = Clock::now();
  std::shared_ptr<ByteCounter> counter_ = std::make_shared<ByteCounter>();
  std::unique_ptr<Communicator> world_;
  Mesh mesh_;
  RunFolder folder_;
  std::optional<CheckpointReader> resumed_;
  std::optional<TextData> data_;
  ModelConfig model_config_;
  std::optional<MeshModel> model_;
  std::optional<AdamW> optimizer_;
  LossScale loss_scale_;
  std::unique_ptr<GradientSync> gradients_;
  BatchShare share_;
  std::optional<Report> report_;  // first rank
  std::int64_t steps_before_ = 0;
  double step_seconds_ = 0;
  TrainResult result_;
};

Trainer::Trainer(Communicator& world, const TrainJob& job, const TrainHooks& hooks)
    : job_(checked(job)),
      hooks_(hooks),
      world_(counted(whole_group(world, "job"), counter_)),
      mesh_(*world_, job.mesh),
      loss_scale_(job.train.loss_scale, job.dtype),
      share_(mesh_, own_positions(mesh_, job), job.train.seq_len) {
  load_data();
  build_model();
  open_run_folder();
  if (resumed_) restore();
  resumed_.reset();
  together(*world_, "opening the run folder", [&] {
    if (first()) report_.emplace(folder_, job_.config_yaml, steps_before_, job_.train.steps, hooks_.on_event, hooks_.progress);
  });
}

void Trainer::load_data() {
  folder_.path = job_.train.out.empty() ? "runs/" + job_.name : job_.train.out;
  if (job_.resume) {
    std::string checkpoint;
    together(*world_, "finding the checkpoint", [&] {
      if (first()) checkpoint = find_checkpoint(existing_run_folder(folder_.path).path);
    });
    resumed_ = open_checkpoint(*world_, world_->gather_strings(checkpoint, {.verb = "checkpoint"}).front());
  }
  together(*world_, "reading the text", [&] {
    const TextOptions options{.held_out = job_.data.held_out, .seq_len = job_.train.seq_len};
    if (resumed_) {
      const Alphabet alphabet = Alphabet::from_json(resumed_->manifest().alphabet, resumed_->path());
      data_ = TextData::load(job_.data.path, options, &alphabet);
    } else {
      data_ = TextData::load(job_.data.path, options);
    }
  });
}

// Before the run folder is touched: what the config gets wrong must not set an older run aside.
void Trainer::build_model() {
  ModelConfig model = job_.model;
  model.vocab = data_->alphabet().size();
  together(*world_, "building the model", [&] {
    require(model.position != "learned" || job_.train.seq_len <= model.max_seq,
            "train.seq_len is {} but model.max_seq has {} learned positions; raise model.max_seq or use model.position=rope",
            job_.train.seq_len, model.max_seq);
    model_config_ = resolve(model);
    if (resumed_) require_same_model(model_config_, *resumed_);
    model_.emplace(mesh_, job_, model_config_);
  });
  const std::span<Parameter* const> parameters = model_->transformer.parameters();
  optimizer_.emplace(parameters, AdamWOptions{.beta1 = job_.train.beta1,
                                              .beta2 = job_.train.beta2,
                                              .epsilon = job_.train.epsilon,
                                              .weight_decay = job_.train.weight_decay});
  if (invariant(job_))
    gradients_ = std::make_unique<InvariantGradientSync>(mesh_, parameters, job_.train.batch);
  else
    gradients_ = std::make_unique<GradientSync>(mesh_, parameters);
}

void Trainer::open_run_folder() {
  together(*world_, "making the run folder", [&] {
    if (first()) folder_ = job_.resume ? existing_run_folder(folder_.path) : fresh_run_folder(folder_.path);
  });
}

void Trainer::restore() {
  load_weights(*world_, *resumed_, model_->transformer.parameters());
  load_moments(*world_, *resumed_, *optimizer_);
  loss_scale_.restore(resumed_->manifest().values);
  optimizer_->set_steps_done(resumed_->manifest().step - loss_scale_.skipped());
  steps_before_ = resumed_->manifest().step;
  result_.checkpoint = resumed_->path();
}

// Sums a loss and other numbers over the world, each contributed once, in one exchange.
std::array<double, 2> Trainer::sum_over_world(LossSum& loss, const std::array<double, 2>& others) {
  const std::span<double> places = loss.places();
  std::vector<double> sums(places.begin(), places.end());
  sums.insert(sums.end(), others.begin(), others.end());
  const auto count = static_cast<std::int64_t>(sums.size());
  world_->all_reduce_sum(TensorView(sums.data(), DType::kF64, {count}), {.verb = "step_sums"});
  std::copy_n(sums.begin(), places.size(), places.begin());
  return {sums[places.size()], sums[places.size() + 1]};
}

// The gradients of one step, summed; and the step's loss and gradient norm, equal on every rank. (Summed gradients are equal
// over the replicas, of which one contributes their norm.)
Trainer::StepSums Trainer::forward_backward(std::int64_t step) {
  const std::int64_t sent_before = counter_->total().sent;
  model_->transformer.zero_gradients();
  LossSum loss(mesh_, invariant(job_), job_.train.batch);
  share_.for_each_piece(job_.train.batch, pieces_of(job_.train.batch, job_.train.accumulate), [&](Interval rows) {
    TokenBatch batch = share_.tokens(rows, [&](std::int64_t row) {
      return data_->train_window(static_cast<std::uint64_t>(job_.train.seed), step, row, job_.train.seq_len);
    });
    batch.step = static_cast<std::uint64_t>(step);
    batch.loss_scale = 1.0 / static_cast<double>(job_.train.batch * job_.train.seq_len);
    batch.gradient_scale = loss_scale_.scale();
    loss.add(rows, model_->transformer.forward_backward(batch));
    gradients_->piece_done();
  });
  if (hooks_.on_gradients) hooks_.on_gradients(step, model_->transformer.parameters());
  gradients_->sum();
  const auto sent = static_cast<double>(counter_->total().sent - sent_before);
  const std::array<double, 2> others = sum_over_world(loss, {gradients_->squared_norm_share(), sent});
  return {loss.total(), std::sqrt(others[0]) / loss_scale_.scale(), static_cast<std::int64_t>(others[1])};
}

bool Trainer::may_step(std::int64_t step, const StepSums& sums, double rate) {
  if (std::isfinite(sums.loss) && std::isfinite(sums.grad_norm)) return true;
  if (std::isfinite(sums.loss) && loss_scale_.on()) {
    const double before = loss_scale_.scale();
    if (loss_scale_.step_skipped()) {
      if (report_) report_->skipped(step + 1, before, loss_scale_.scale());
      return false;
    }
  }
  before_throwing_together(*world_);
  fail(ErrorCode::kDiverged,
       "training diverged at step {}: loss {}, gradient norm {}, learning rate {:.3g}; lower train.learning_rate, lengthen "
       "train.warmup_steps or lower train.clip_norm; {}",
       step + 1, sums.loss, sums.grad_norm, rate,
       result_.checkpoint.empty() ? "no checkpoint was written yet (train.checkpoint_every)"
                                  : "the last good checkpoint is " + result_.checkpoint + ", --resume continues it");
}

void Trainer::step(std::int64_t step) {
  const auto begin = Clock::now();
  const double rate = learning_rate(schedule_of(job_.train), step);
  const StepSums sums = forward_backward(step);
  const double scale = loss_scale_.scale();
  if (may_step(step, sums, rate)) {
    optimizer_->step(rate, clip_factor(sums.grad_norm, job_.train.clip_norm) / scale);
    loss_scale_.step_taken();
  }

  const double seconds = seconds_since(begin);
  step_seconds_ += seconds;
  result_.loss = sums.loss;
  result_.losses.push_back(sums.loss);
  result_.steps = step + 1;
  result_.bytes_sent += sums.bytes;
  if (!report_) return;
  const auto tokens = static_cast<double>(job_.train.batch * job_.train.seq_len);
  report_->step({step + 1, sums.loss, sums.grad_norm, rate, tokens / seconds, sums.bytes,
                 loss_scale_.on() ? std::optional(scale) : std::nullopt});
}

// Bits per symbol over windows of the held-out text, spread evenly over it; cut over the mesh as a training step is.
double Trainer::evaluate() {
  const std::int64_t windows = data_->held_out_windows(job_.train.seq_len), batch = job_.train.batch;
  const std::int64_t used = job_.train.eval_batches == 0 ? windows : std::min(windows, job_.train.eval_batches * batch);
  const std::int64_t pieces = (used + batch - 1) / batch * job_.train.accumulate;  // as much memory as a training step
  LossSum loss(mesh_, invariant(job_), used);
  share_.for_each_piece(used, pieces_of(used, pieces), [&](Interval rows) {
    TokenBatch tokens =
        share_.tokens(rows, [&](std::int64_t row) { return data_->held_out_window(row * windows / used, job_.train.seq_len); });
    tokens.loss_scale = 1.0 / static_cast<double>(used * job_.train.seq_len);
    loss.add(rows, model_->transformer.loss(tokens));
  });
  sum_over_world(loss, {});
  return loss.total() / std::numbers::ln2;
}

void Trainer::save(std::int64_t steps_done) {
  CheckpointManifest manifest;
  manifest.step = steps_done;
  manifest.config = job_.config_yaml;
  manifest.model = model_to_json(model_config_);
  manifest.alphabet = data_->alphabet().to_json();
  manifest.values = {{"seq_len", std::to_string(job_.train.seq_len)},
                     {"seed", std::to_string(job_.train.seed)},
                     {"next_step", std::to_string(steps_done)},  // the data's cursor: batches follow from (seed, step)
                     {"dtype", std::string(name_of(job_.dtype))},
                     {"attention", to_json(to_node(job_.attention))}};
  loss_scale_.save(manifest.values);
  result_.checkpoint =
      save_checkpoint(mesh_, folder_.path + "/checkpoints", manifest, model_->transformer.parameters(), *optimizer_);
  together(*world_, "removing old checkpoints", [&] {
    if (first()) keep_newest(folder_.checkpoints(), job_.train.keep_checkpoints);
  });
}

// The first whole line of some length in the held-out text.
std::string held_out_line(const TextData& data) {
  std::vector<std::int32_t> symbols;
  for (const std::uint8_t symbol : data.held_out().first(std::min<std::size_t>(data.held_out().size(), 4096)))
    symbols.push_back(symbol);
  std::string text = data.alphabet().decode(symbols);
  if (const auto end_of_line = text.find('\n'); end_of_line < text.size() / 2) text.erase(0, end_of_line + 1);
  text.erase(0, std::min(text.size() - 1, text.find_first_not_of(" \r\n")));
  return text.substr(0, std::clamp<std::size_t>(text.find('\n', 20), 1, 80));
}

// The config's prompt, or a held-out line where there is none or the text has not all of its symbols (any text may be
// trained on with a config made for another one).
std::string sample_prompt(const TextData& data, const std::string& wanted) {
  std::string known = held_out_line(data);
  if (wanted.empty()) return known;
  try {
    (void)data.alphabet().encode(wanted);
    return wanted;
  } catch (const Error&) {
    return known;
  }
}

void Trainer::write_sample() {
  if (job_.train.sample_length <= 0) return;
  const std::string prompt = sample_prompt(*data_, job_.train.sample_prompt);
  GenerateOptions options;
  options.max_tokens = job_.train.sample_length;
  options.sampling.temperature = 0.8;
  options.sampling.seed = static_cast<std::uint64_t>(job_.train.seed);
  const GenerateResult generated = generate(*world_, mesh_.shape(), result_.checkpoint, prompt, options, {});
  result_.sample = prompt + generated.text;
  together(*world_, "writing the sample", [&] {
    if (report_) report_->write_sample(result_.sample + "\n");
  });
}

void Trainer::count_ngrams() {
  const std::int64_t vocabulary = data_->alphabet().size();
  std::array<double, 2> bits{};
  if (first()) {
    for (const int order : {2, 3})
      bits[static_cast<std::size_t>(order) - 2] = ngram_bits(data_->train(), data_->held_out(), vocabulary, order);
  }
  world_->broadcast(std::as_writable_bytes(std::span(bits)), 0, {.verb = "ngrams"});
  result_.bigram_bits_per_char = bits[0];
  result_.trigram_bits_per_char = bits[1];
}

TrainResult Trainer::run() {
  const TrainConfig& config = job_.train;
  result_.run_dir = folder_.path;
  result_.parameters = count_parameters(model_config_);
  result_.steps = steps_before_;
  count_ngrams();
  if (report_) {
    report_->line(fmt::format("{} parameters, mesh {}, {} symbols of text ({} held out), alphabet of {}", result_.parameters,
                              mesh_.shape().text(), data_->train().size() + data_->held_out().size(), data_->held_out().size(),
                              data_->alphabet().size()));
  }
  for (std::int64_t next = steps_before_; next < config.steps; ++next) {
    step(next);
    const std::int64_t done = next + 1;
    const bool last = done == config.steps;
    if (config.eval_every > 0 && done % config.eval_every == 0 && !last) {
      const double bits = evaluate();
      if (report_) report_->held_out(done, bits);
    }
    if (last || (config.checkpoint_every > 0 && done % config.checkpoint_every == 0)) save(done);
  }
  result_.held_out_bits_per_char = evaluate();
  if (report_) report_->held_out(result_.steps, result_.held_out_bits_per_char);
  write_sample();
  result_.wall_s = seconds_since(start_);
  const auto tokens = static_cast<double>(static_cast<std::int64_t>(result_.losses.size()) * config.batch * config.seq_len);
  result_.tokens_per_s = step_seconds_ > 0 ? tokens / step_seconds_ : 0;
  together(*world_, "completing the run folder", [&] {
    if (report_) report_->done(result_);
  });
  return result_;
}

}  // namespace

TrainResult train(Communicator& world, const TrainJob& job, const TrainHooks& hooks) {
  Trainer trainer(world, job, hooks);
  return trainer.run();
}

}  // namespace dattn
