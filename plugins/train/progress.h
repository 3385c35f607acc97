// The progress line of a training run, on stderr: rewritten in place on a terminal, a plain line every few seconds
// otherwise. Silent on every rank but the first.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace dattn {

struct StepFigures {
  std::int64_t step = 0;  // counted from 1
  double loss = 0;        // nats per token, mean over the step
  double grad_norm = 0;
  double learning_rate = 0;
  double tokens_per_s = 0;
  std::int64_t bytes_sent = 0;            // by all ranks together, in this step
  std::optional<double> loss_scale = {};  // fp16
};

std::string text_of_bytes(double bytes);      // "1.5 MB"
std::string text_of_seconds(double seconds);  // "4:05" or "1:02:30"

class Progress {
 public:
  // `steps` is the last step of the run.
  Progress(bool shown, std::int64_t steps);
  ~Progress();

  void step(const StepFigures& figures, double eta_s);
  void line(const std::string& text);  // a line of its own that stays

 private:
  bool shown_;
  bool terminal_;
  bool line_open_ = false;  // a rewritten line stands on the terminal
  std::int64_t steps_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace dattn
