// How the bench commands take times: calls that all ranks start together, and what the processors do at most beside them.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "launch/commands/commands.h"

namespace dattn {

struct Percentiles {  // milliseconds
  double p20, p50, p80;
  Json json() const { return {{"p20", p20}, {"p50", p50}, {"p80", p80}}; }
};

// Milliseconds of calls that all ranks start together, each as long as its slowest rank takes; equal on all ranks.
std::vector<double> time_calls(Communicator& world, int repeat, const std::function<void()>& body,
                               const std::function<void()>& between = {});
Percentiles percentiles_of(std::vector<double> times);

// The sum over all ranks of what body() returns, each of which calls it at the same time.
double sum_of_ranks(Communicator& world, const std::function<double()>& body);

// Times calls beside what the processors can do at that moment: where other programs take a part of them, that moves the
// calls and the peak alike, but not the share. Of a GPU no peak is measured here: see its maker's, or `bench product`.
class PeakTimer {
 public:
  PeakTimer(Communicator& world, DType storage) : world_(world), storage_(storage), on_cpu_(!current_device().is_cuda()) {}

  // Times `repeat` calls of `flops` each, after one that warms up. Adds to `done` NAMEgflops, of the median time, and
  // NAMEof_peak, the median of the calls' shares of the peak around them.
  Percentiles time(Json& done, std::string_view name, double flops, int repeat, const std::function<void()>& body);
  // peak_gflops: the greatest; peak_gflops_before_after: the first and the last.
  void add_peaks(Json& done) const;

 private:
  Communicator& world_;
  DType storage_;
  bool on_cpu_;
  std::vector<double> peaks_;  // GFLOP/s of all ranks together
};

}  // namespace dattn
