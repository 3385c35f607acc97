#include "launch/commands/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include <fmt/format.h>

#include "core/attention/cpu/peak.h"
#include "core/device/stream.h"

namespace dattn {

Percentiles time_calls(Communicator& world, int repeat, const std::function<void()>& body) {
  std::vector<double> times;
  body();  // warms up: plans, memory pages, kernels
  current_stream().synchronize();
  for (int i = 0; i < repeat; ++i) {
    world.barrier({"bench"});
    const auto start = std::chrono::steady_clock::now();
    body();
    current_stream().synchronize();
    world.barrier({"bench"});
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times[static_cast<std::size_t>(std::lround(share * static_cast<double>(times.size() - 1)))];
  };
  return {at(0.2), at(0.5), at(0.8)};
}

double sum_of_ranks(Communicator& world, const std::function<double()>& body) {
  world.barrier({"bench"});
  double sum = body();
  world.all_reduce_sum(TensorView(&sum, DType::kF64, {1}), {"bench"});
  return sum;
}

PeakOfRanks::PeakOfRanks(Communicator& world, DType storage)
    : world_(world), storage_(storage), on_cpu_(!current_device().is_cuda()) {
  if (on_cpu_) before_ = measure();
}

double PeakOfRanks::measure() const {
  return sum_of_ranks(world_, [this] { return peak_flops(storage_) * 1e-9; });
}

void PeakOfRanks::add_to(Json& done, std::initializer_list<const char*> names) {
  if (!on_cpu_) return;
  const double after = measure(), peak = std::max(before_, after);
  done["peak_gflops"] = peak;
  done["peak_gflops_before_after"] = {before_, after};
  for (const char* name : names) {
    const auto gflops = done.find(fmt::format("{}gflops", name));
    if (gflops != done.end()) done[fmt::format("{}of_peak", name)] = gflops->get<double>() / peak;
  }
}

}  // namespace dattn
