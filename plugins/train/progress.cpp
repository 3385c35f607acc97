// The progress line (see progress.h).
#include "plugins/train/progress.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>

#include <fmt/format.h>

namespace dattn {
namespace {

constexpr double kTerminalInterval = 0.1;  // seconds between rewrites
constexpr double kPlainInterval = 5.0;     // seconds between lines

}  // namespace

std::string text_of_bytes(double bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  std::size_t unit = 0;
  for (; bytes >= 1000 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1000;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 1, kUnits[unit]);
}

std::string text_of_seconds(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::llround(std::max(0.0, seconds)));
  if (whole >= 3600) return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

Progress::Progress(bool shown, std::int64_t steps)
    : shown_(shown), terminal_(shown && isatty(STDERR_FILENO) == 1), steps_(steps) {}

Progress::~Progress() {
  if (line_open_) std::fputc('\n', stderr);
}

void Progress::step(const StepFigures& figures, double eta_s) {
  if (!shown_) return;
  const auto now = std::chrono::steady_clock::now();
  const double interval = terminal_ ? kTerminalInterval : kPlainInterval;
  const bool due = last_.time_since_epoch().count() == 0 || std::chrono::duration<double>(now - last_).count() >= interval;
  if (!due && figures.step != steps_) return;
  last_ = now;
  const std::string text =
      fmt::format("step {:>{}}/{}  loss {:.4f}  lr {:.2e}  {:.0f} tokens/s  ETA {}  sent {}/step", figures.step,
                  fmt::formatted_size("{}", steps_), steps_, figures.loss, figures.learning_rate, figures.tokens_per_s,
                  text_of_seconds(eta_s), text_of_bytes(static_cast<double>(figures.bytes_sent)));
  fmt::print(stderr, "{}{}{}", terminal_ ? "\r\x1b[K" : "", text, terminal_ ? "" : "\n");
  std::fflush(stderr);
  line_open_ = terminal_;
}

void Progress::line(const std::string& text) {
  if (!shown_) return;
  fmt::print(stderr, "{}{}\n", line_open_ ? "\n" : "", text);
  std::fflush(stderr);
  line_open_ = false;
}

}  // namespace dattn
