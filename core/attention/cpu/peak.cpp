#include "core/attention/cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "core/attention/cpu/drive.h"
#include "core/attention/cpu/paths.h"
#include "core/base/error.h"
#include "core/base/threads.h"

namespace dattn {
namespace {

double seconds_of(const auto& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double multiply_add_rate(DType storage, double seconds) {
  require(storage == DType::kF32 || is_half(storage), "the peak of the cpu kernel is known for fp32, bf16 and fp16, not for {}",
          name_of(storage));
  const cpu::Ops& ops = cpu::ops_for(cpu::choose_path(), storage);
  constexpr std::int64_t kFirstRounds = 20000;
  const double first = seconds_of([&] { ops.multiply_adds(kFirstRounds); });
  const auto rounds = static_cast<std::int64_t>(static_cast<double>(kFirstRounds) * std::max(1.0, seconds / first));
  std::vector<double> flops(static_cast<std::size_t>(num_threads()));
  const double taken = seconds_of([&] {
    parallel_for(static_cast<std::int64_t>(flops.size()),
                 [&](std::int64_t thread) { flops[static_cast<std::size_t>(thread)] = ops.multiply_adds(rounds); });
  });
  return std::accumulate(flops.begin(), flops.end(), 0.0) / taken;
}

double peak_flops(DType storage) {
  double best = 0;
  for (int stretch = 0; stretch < 5; ++stretch) best = std::max(best, multiply_add_rate(storage, 0.01));
  return best;
}

double read_bandwidth() {
  constexpr std::int64_t kWords = std::int64_t{1} << 25, kPart = std::int64_t{1} << 16;
  const Tensor memory = Tensor::uninitialized(DType::kF64, {kWords});  // in huge pages, as all that is large
  auto* const words = memory.ptr<std::uint64_t>();
  std::fill_n(words, kWords, 1);
  std::vector<std::uint64_t> sums(kWords / kPart);
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double seconds = seconds_of([&] {
      parallel_for(kWords / kPart, [&](std::int64_t part) {
        const auto from = words + part * kPart;
        sums[static_cast<std::size_t>(part)] += std::accumulate(from, from + kPart, std::uint64_t{0});
      });
    });
    best = std::max(best, static_cast<double>(kWords * 8) / seconds);
  }
  ensure(std::accumulate(sums.begin(), sums.end(), std::uint64_t{0}) == 5 * kWords, "the passes over memory read other values");
  return best;
}

}  // namespace dattn
