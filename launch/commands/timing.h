// How the bench commands take times: calls that all ranks start together, and what the processors do at most beside them.
#pragma once

#include <functional>

#include "launch/commands/commands.h"

namespace dattn {

struct Percentiles {
  double p20, p50, p80;
  Json json() const { return {{"p20", p20}, {"p50", p50}, {"p80", p80}}; }
};

// Milliseconds of `repeat` calls, after one that warms up, each started together on all ranks and counted until the last has
// ended.
Percentiles time_calls(Communicator& world, int repeat, const std::function<void()>& body);

// The sum over all ranks of what body() returns, each of which calls it at the same time.
double sum_of_ranks(Communicator& world, const std::function<double()>& body);

// What processors do at most, before the calls that are judged by it and after them: where it moved, so did their times.
// Of a GPU no such figure is measured here: see its maker's, or `bench product`.
class PeakOfRanks {
 public:
  PeakOfRanks(Communicator& world, DType storage);
  // Measures again and adds peak_gflops, peak_gflops_before_after and, for each NAMEgflops of `names`, NAMEof_peak.
  void add_to(Json& done, std::initializer_list<const char*> names);

 private:
  double measure() const;
  Communicator& world_;
  DType storage_;
  bool on_cpu_;
  double before_ = 0;
};

}  // namespace dattn
