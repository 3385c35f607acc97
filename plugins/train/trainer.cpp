// The training loop (see trainer.h).
#include "plugins/train/trainer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numbers>
#include <optional>

#include "core/base/error.h"
#include "core/device/stream.h"
#include "core/nn/optimizer.h"
#include "parallel/comm/decorators.h"
#include "plugins/infer/generate.h"
#include "plugins/train/model_state.h"
#include "plugins/train/ngram.h"
#include "plugins/train/text_data.h"
#include "plugins/train/together.h"
#include "plugins/train/train_step.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const TrainJob& checked(const TrainJob& job) {
  require_trainable(job);
  return job;
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

class Trainer {
 public:
  Trainer(Communicator& world, const TrainJob& job, const TrainHooks& hooks);
  TrainResult run();

 private:
  bool first() const { return world_->rank() == 0; }
  void open_run_folder();
  void load_data();
  void build_model();
  void restore();
  [[noreturn]] void fail_diverged(std::int64_t step, const StepSums& sums, double rate);
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
  std::optional<TrainStep> step_;
  std::optional<Report> report_;  // first rank
  std::int64_t steps_before_ = 0;
  double step_seconds_ = 0;
  TrainResult result_;
};

Trainer::Trainer(Communicator& world, const TrainJob& job, const TrainHooks& hooks)
    : job_(checked(job)), hooks_(hooks), world_(counted(whole_group(world, "job"), counter_)), mesh_(*world_, job.mesh) {
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
    model_config_ = resolve(model);
    if (resumed_) require_same_model(model_config_, *resumed_);
    step_.emplace(*world_, *counter_, mesh_, job_, model_config_);
  });
}

void Trainer::open_run_folder() {
  together(*world_, "making the run folder", [&] {
    if (first()) folder_ = job_.resume ? existing_run_folder(folder_.path) : fresh_run_folder(folder_.path);
  });
}

void Trainer::restore() {
  load_weights(*world_, *resumed_, step_->transformer().parameters());
  load_moments(*world_, *resumed_, step_->optimizer());
  step_->loss_scale().restore(resumed_->manifest().values);
  step_->optimizer().set_steps_done(resumed_->manifest().step - step_->loss_scale().skipped());
  steps_before_ = resumed_->manifest().step;
  result_.checkpoint = resumed_->path();
}

void Trainer::fail_diverged(std::int64_t step, const StepSums& sums, double rate) {
  together(*world_, "computing", [] { current_stream().synchronize(); });  // what a failing device computes is no divergence
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
  const StepSums sums = step_->forward_backward(
      step,
      [&](std::int64_t row) {
        return data_->train_window(static_cast<std::uint64_t>(job_.train.seed), step, row, job_.train.seq_len);
      },
      [&](std::span<Parameter* const> parameters) {
        if (hooks_.on_gradients) hooks_.on_gradients(step, parameters);
      });
  const double scale = step_->loss_scale().scale();
  const Update update = step_->update(rate, sums);
  if (update == Update::kDiverged) fail_diverged(step, sums, rate);
  if (update == Update::kOverflowed && report_) report_->skipped(step + 1, scale, step_->loss_scale().scale());

  const double seconds = seconds_since(begin);
  step_seconds_ += seconds;
  result_.loss = sums.loss;
  result_.losses.push_back(sums.loss);
  result_.steps = step + 1;
  const std::int64_t bytes = sums.bytes + (update == Update::kTaken ? sums.update_bytes : 0);
  result_.bytes_sent += bytes;
  if (!report_) return;
  const auto tokens = static_cast<double>(job_.train.batch * job_.train.seq_len);
  report_->step({step + 1, sums.loss, sums.grad_norm, rate, tokens / seconds, bytes,
                 step_->loss_scale().on() ? std::optional(scale) : std::nullopt});
}

// Bits per symbol over windows of the held-out text, spread evenly over it; cut over the mesh as a training step is.
double Trainer::evaluate() {
  const std::int64_t windows = data_->held_out_windows(job_.train.seq_len), batch = job_.train.batch;
  const std::int64_t used = job_.train.eval_batches == 0 ? windows : std::min(windows, job_.train.eval_batches * batch);
  const double loss =
      step_->loss(used, [&](std::int64_t row) { return data_->held_out_window(row * windows / used, job_.train.seq_len); });
  return loss / std::numbers::ln2;
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
  step_->loss_scale().save(manifest.values);
  result_.checkpoint = save_checkpoint(mesh_, folder_.path + "/checkpoints", manifest, step_->transformer().parameters(),
                                       step_->shares(), step_->optimizer());
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
