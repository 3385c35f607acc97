// What a training run tells and leaves behind (see report.h).
#include "plugins/train/report.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numbers>

#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace dattn {

using nlohmann::ordered_json;

void write_text_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file << text;
  file.close();
  std::error_code error;
  if (file.good()) std::filesystem::rename(temporary, path, error);
  if (file.good() && !error) return;
  std::filesystem::remove(temporary, error);
  fail(ErrorCode::kSystem, "{} ({} bytes) cannot be written; check the free space and the permissions", path, text.size());
}

Report::Report(RunFolder folder, const std::string& config_yaml, std::int64_t first_step, std::int64_t steps, EventSink events,
               bool progress)
    : folder_(std::move(folder)),
      first_step_(first_step),
      steps_(steps),
      events_(std::move(events)),
      progress_(progress, steps),
      metrics_(folder_.metrics(), first_step > 0 ? std::optional(first_step) : std::nullopt),
      tensorboard_(folder_.tensorboard(), first_step > 0 ? std::optional(first_step) : std::nullopt),
      last_step_(std::chrono::steady_clock::now()) {
  write_text_file(folder_.config(), config_yaml);
  plot_.title = std::filesystem::path(folder_.path).filename().string();
  if (first_step > 0) recall();
  if (!folder_.set_aside.empty()) line("the older run of this name is now " + folder_.set_aside);
}

void Report::recall() {
  std::ifstream file(folder_.metrics());
  for (std::string text; std::getline(file, text);) {
    const ordered_json event = ordered_json::parse(text, nullptr, false);
    if (!event.is_object() || !event.contains("step")) continue;
    const double step = event["step"].get<double>();
    if (event.contains("loss") && event["loss"].is_number())
      plot_.train.emplace_back(step, event["loss"].get<double>() / std::numbers::ln2);
    if (event.contains("held_out_bits_per_char"))
      plot_.held_out.emplace_back(step, event["held_out_bits_per_char"].get<double>());
  }
}

void Report::emit(const std::string& json_line) {
  metrics_.append(json_line);
  if (events_) events_(json_line);
}

void Report::step(const StepFigures& figures) {
  ordered_json event = {{"event", "step"},
                        {"step", figures.step},
                        {"loss", figures.loss},
                        {"grad_norm", figures.grad_norm},
                        {"learning_rate", figures.learning_rate},
                        {"tokens_per_s", figures.tokens_per_s},
                        {"bytes_sent", figures.bytes_sent}};
  if (figures.loss_scale) event["loss_scale"] = *figures.loss_scale;
  emit(event.dump());
  if (figures.loss_scale) tensorboard_.scalar("train/loss_scale", figures.step, *figures.loss_scale);
  tensorboard_.scalar("train/loss", figures.step, figures.loss);
  tensorboard_.scalar("train/grad_norm", figures.step, figures.grad_norm);
  tensorboard_.scalar("train/learning_rate", figures.step, figures.learning_rate);
  tensorboard_.scalar("train/tokens_per_s", figures.step, figures.tokens_per_s);
  plot_.train.emplace_back(static_cast<double>(figures.step), figures.loss / std::numbers::ln2);

  const auto now = std::chrono::steady_clock::now();
  step_seconds_ += std::chrono::duration<double>(now - std::exchange(last_step_, now)).count();
  const double each = step_seconds_ / static_cast<double>(std::max<std::int64_t>(1, figures.step - first_step_));
  progress_.step(figures, each * static_cast<double>(steps_ - figures.step));
}

void Report::skipped(std::int64_t step, double scale, double next_scale) {
  emit(ordered_json{{"event", "skipped"}, {"step", step}, {"loss_scale", scale}, {"next_loss_scale", next_scale}}.dump());
  line(fmt::format("step {}: gradients overflowed at loss scale {:.0f}; the step is skipped, the scale is now {:.0f}", step,
                   scale, next_scale));
}

void Report::held_out(std::int64_t step, double bits_per_char) {
  emit(ordered_json{{"event", "held_out"}, {"step", step}, {"held_out_bits_per_char", bits_per_char}}.dump());
  tensorboard_.scalar("held_out/bits_per_char", step, bits_per_char);
  plot_.held_out.emplace_back(static_cast<double>(step), bits_per_char);
}

void Report::write_sample(const std::string& text) { write_text_file(folder_.sample(), text); }

void Report::done(const TrainResult& result) {
  plot_.bigram = result.bigram_bits_per_char;
  plot_.trigram = result.trigram_bits_per_char;
  const bool drawn = write_loss_plot(plot_, folder_.loss_picture());
  emit(ordered_json{{"event", "done"},
                    {"steps", result.steps},
                    {"loss", result.loss},
                    {"held_out_bits_per_char", result.held_out_bits_per_char},
                    {"bigram_bits_per_char", result.bigram_bits_per_char},
                    {"trigram_bits_per_char", result.trigram_bits_per_char},
                    {"wall_s", result.wall_s},
                    {"tokens_per_s", result.tokens_per_s},
                    {"bytes_sent", result.bytes_sent},
                    {"parameters", result.parameters},
                    {"run_dir", result.run_dir},
                    {"checkpoint", result.checkpoint}}
           .dump());
  line(fmt::format("held-out loss {:.3f} bits per character (a bigram model has {:.3f}, a trigram model {:.3f}); {} in all",
                   result.held_out_bits_per_char, result.bigram_bits_per_char, result.trigram_bits_per_char,
                   text_of_seconds(result.wall_s)));
  if (!result.sample.empty()) line(fmt::format("--- sample ---\n{}\n--------------", result.sample));
  line(fmt::format("run folder    {}", result.run_dir));
  line(fmt::format("checkpoint    {}", result.checkpoint));
  if (drawn) line(fmt::format("loss curve    {}", folder_.loss_picture()));
  line(fmt::format("metrics       {}  and TensorBoard events in {}", folder_.metrics(), folder_.tensorboard()));
  if (!result.sample.empty()) line(fmt::format("sample        {}", folder_.sample()));
}

}  // namespace dattn
