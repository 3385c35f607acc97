#include "plugins/train/plot.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/log.h"

extern char** environ;

namespace dattn {
namespace {

// A string between gnuplot's single quotes, where a quote is doubled and nothing else is special.
std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) {
    if (c == '\'') result += '\'';
    if (c != '\n') result += c;
  }
  return result + "'";
}

std::string data_block(const char* name, const std::vector<std::pair<double, double>>& points) {
  std::string block = fmt::format("${} << EOD\n", name);
  for (const auto& [step, bits] : points) {
    if (std::isfinite(step) && std::isfinite(bits)) block += fmt::format("{:.10g} {:.10g}\n", step, bits);
  }
  return block + "EOD\n";
}

std::string make_script(const LossPlot& plot, const std::string& png_path) {
  std::string script = data_block("train", plot.train) + data_block("held", plot.held_out);
  script += fmt::format(
      "set terminal pngcairo size 1000,600 font 'Sans,12' noenhanced\nset output {}\nset title {}\n"
      "set xlabel 'step'\nset ylabel 'bits per character'\nset grid lc rgb '#dddddd'\nset key top right\nset offsets 0, 0, "
      "0.1, 0.1\n",
      quoted(png_path), quoted(plot.title));
  std::string curves;
  const auto add = [&](const std::string& curve) { curves += (curves.empty() ? "" : ", ") + curve; };
  if (!plot.train.empty()) add("$train using 1:2 with lines lw 1.5 lc rgb '#9ab8d8' title 'training batches'");
  if (!plot.held_out.empty()) {
    add(fmt::format("$held using 1:2 with linespoints lw 2 pt 7 ps 0.8 lc rgb '#1f4e8c' title 'held out ({:.2f})'",
                    plot.held_out.back().second));
  }
  if (plot.bigram)
    add(fmt::format("{0:.6g} with lines dt 2 lw 1.5 lc rgb '#b03a2e' title 'bigram model ({0:.2f})'", *plot.bigram));
  if (plot.trigram)
    add(fmt::format("{0:.6g} with lines dt 3 lw 1.5 lc rgb '#c77c11' title 'trigram model ({0:.2f})'", *plot.trigram));
  return script + "plot " + curves + "\n";
}

// Runs gnuplot on a script file, its output thrown away; the reason of a failure, or empty.
std::string run_gnuplot(const std::string& script_path) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    posix_spawn_file_actions_addopen(&actions, stream, "/dev/null", O_RDWR, 0);
  }
  std::string program = "gnuplot";
  std::string argument = script_path;
  char* arguments[] = {program.data(), argument.data(), nullptr};
  pid_t child = 0;
  const int error = posix_spawnp(&child, program.c_str(), &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return error == ENOENT ? "gnuplot is not installed" : fmt::format("gnuplot: {}", std::strerror(error));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : fmt::format("gnuplot failed with status {}", status);
}

}  // namespace

bool write_loss_plot(const LossPlot& plot, const std::string& png_path) {
  std::string reason = "there is nothing to draw";
  try {
    if (!plot.train.empty() || !plot.held_out.empty()) {
      const std::string script = png_path + ".gp";
      const std::string unfinished = png_path + ".tmp";
      write_file(script, make_script(plot, unfinished));
      reason = run_gnuplot(script);
      std::filesystem::remove(script);
      if (reason.empty()) std::filesystem::rename(unfinished, png_path);
      if (!reason.empty()) std::filesystem::remove(unfinished);
    }
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (!reason.empty()) info("warning: no loss curve at {}: {}", png_path, reason);
  return reason.empty();
}

}  // namespace dattn
