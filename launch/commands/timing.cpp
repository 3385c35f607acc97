#include "launch/commands/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include <fmt/format.h>

#include "core/attention/cpu/peak.h"
#include "core/device/stream.h"

namespace dattn {

namespace {

double at_share(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<std::size_t>(std::lround(share * static_cast<double>(sorted.size() - 1)))];
}

}  // namespace

Percentiles percentiles_of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {at_share(times, 0.2), at_share(times, 0.5), at_share(times, 0.8)};
}

std::vector<double> time_calls(Communicator& world, int repeat, const std::function<void()>& body,
                               const std::function<void()>& between) {
  std::vector<double> times;
  body();  // warms up: plans, memory pages, kernels
  current_stream().synchronize();
  if (between) between();
  for (int i = 0; i < repeat; ++i) {
    world.barrier({"bench"});
    const auto start = std::chrono::steady_clock::now();
    body();
    current_stream().synchronize();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    if (between) between();
  }
  world.all_reduce_max(TensorView(times.data(), DType::kF64, {repeat}), {"bench"});
  return times;
}

double sum_of_ranks(Communicator& world, const std::function<double()>& body) {
  world.barrier({"bench"});
  double sum = body();
  world.all_reduce_sum(TensorView(&sum, DType::kF64, {1}), {"bench"});
  return sum;
}

Percentiles PeakTimer::time(Json& done, std::string_view name, double flops, int repeat, const std::function<void()>& body) {
  constexpr double kStretch = 0.002;  // seconds
  std::vector<double> peaks;
  const auto measure = [&] {
    if (on_cpu_) peaks.push_back(sum_of_ranks(world_, [&] { return multiply_add_rate(storage_, kStretch) * 1e-9; }));
  };
  const std::vector<double> times = time_calls(world_, repeat, body, measure);
  const Percentiles percentiles = percentiles_of(times);
  done[fmt::format("{}gflops", name)] = flops / percentiles.p50 * 1e-6;
  if (!on_cpu_) return percentiles;
  std::vector<double> shares;
  for (std::size_t i = 0; i < times.size(); ++i) shares.push_back(flops / times[i] * 1e-6 / (0.5 * (peaks[i] + peaks[i + 1])));
  std::sort(shares.begin(), shares.end());
  done[fmt::format("{}of_peak", name)] = at_share(shares, 0.5);
  peaks_.insert(peaks_.end(), peaks.begin(), peaks.end());
  return percentiles;
}

void PeakTimer::add_peaks(Json& done) const {
  if (peaks_.empty()) return;
  done["peak_gflops"] = *std::max_element(peaks_.begin(), peaks_.end());
  done["peak_gflops_before_after"] = {peaks_.front(), peaks_.back()};
}

}  // namespace dattn
