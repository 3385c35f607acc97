// The ceiling of every micro-kernel on one core: multiply-adds on registers that wait for nothing.
#pragma once

#include "core/attention/cpu/simd.h"

namespace dattn::cpu::DATTN_ISA {

// `rounds` multiply-adds on each of twelve accumulators, more than a latency of 5 on two ports needs, as few as fit 16
// registers. Each is a factor of its next value, so that no product can be taken out of the loop. Returns the FLOPs.
template <class Unit>
double multiply_adds(std::int64_t rounds) {
  constexpr int kChains = 12;
  Floats sums[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sums[i] = splat(0.5f + 0.01f * static_cast<float>(i));
  const Floats half = splat(0.5f);
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = multiply_add<Unit>(half, sums[i], half);
  }
  Floats all{};
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) all = all + sums[i];
  volatile float used = sum_of(all);
  (void)used;
  return 2.0 * UnitOf<Unit>::kElements * kLanes * kChains * static_cast<double>(rounds);
}

}  // namespace dattn::cpu::DATTN_ISA
