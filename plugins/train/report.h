// What a training run tells and leaves behind: the progress line, JSON events, metrics.jsonl, TensorBoard scalars, the loss
// curve and config.yaml. Lives on the first rank only.
#pragma once

#include <chrono>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "plugins/train/metrics.h"
#include "plugins/train/plot.h"
#include "plugins/train/progress.h"
#include "plugins/train/run_folder.h"
#include "plugins/train/tensorboard.h"

namespace dattn {

// The result of a run, as the `done` event and the last lines show it.
struct TrainResult {
  std::int64_t steps = 0;                                  // done in all, those before a resume included
  double loss = std::numeric_limits<double>::quiet_NaN();  // nats per symbol, of the last step; NaN where none was left
  double held_out_bits_per_char = 0;
  double bigram_bits_per_char = 0;
  double trigram_bits_per_char = 0;
  double wall_s = 0;
  double tokens_per_s = 0;  // mean over the steps
  std::int64_t parameters = 0;
  std::int64_t bytes_sent = 0;  // by all ranks together, in the steps
  std::string run_dir;
  std::string checkpoint;
  std::string sample;          // text
  std::vector<double> losses;  // of every step of this run
};

class Report {
 public:
  using EventSink = std::function<void(const std::string& json_line)>;

  // first_step: steps that were done before (0 unless resumed). Throws Error(kSystem).
  Report(RunFolder folder, const std::string& config_yaml, std::int64_t first_step, std::int64_t steps, EventSink events,
         bool progress);

  void step(const StepFigures& figures);
  void skipped(std::int64_t step, double scale, double next_scale);  // fp16's gradients overflowed
  void held_out(std::int64_t step, double bits_per_char);
  void line(const std::string& text) { progress_.line(text); }
  void write_sample(const std::string& text);
  void done(const TrainResult& result);

  const RunFolder& folder() const { return folder_; }

 private:
  void emit(const std::string& json_line);
  void recall();  // the curve so far, from the metrics of the steps before a resume

  RunFolder folder_;
  std::int64_t first_step_, steps_;
  EventSink events_;
  Progress progress_;
  MetricsLog metrics_;
  TensorBoardWriter tensorboard_;
  LossPlot plot_;
  double step_seconds_ = 0;  // spent in steps so far, for the ETA
  std::chrono::steady_clock::time_point last_step_;
};

// Writes a text file by way of a temporary one, so that a full disk never leaves half of it. Throws Error(kSystem).
void write_text_file(const std::string& path, const std::string& text);

}  // namespace dattn
