// The loss curve as a picture, drawn by gnuplot where it is installed.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dattn {

struct LossPlot {
  std::string title;
  std::vector<std::pair<double, double>> train;     // (step, bits per character)
  std::vector<std::pair<double, double>> held_out;  // (step, bits per character)
  std::optional<double> bigram;                     // bits per character, a level line
  std::optional<double> trigram;
};

// Writes a PNG; false, with a warning in the log, where gnuplot is absent or fails. Never throws: a picture is no
// reason to lose a run.
bool write_loss_plot(const LossPlot& plot, const std::string& png_path);

}  // namespace dattn
