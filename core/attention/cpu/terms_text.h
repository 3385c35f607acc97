// Score terms: scale * q k^T -> softcap -> ALiBi -> bias, on one row of scores at a time, in memory, so that one piece of
// code serves the forward, backward and decode kernels.
#pragma once

#include "core/attention/cpu/dropout_text.h"

namespace dattn::cpu::DATTN_ISA {

constexpr float kLog2e = 1.44269504088896341f;

// Relative error below 2e-7. Near 0 an odd polynomial (S. Moshier, Cephes), elsewhere 1 - 2 / (e^2|x| + 1).
DATTN_INLINE Floats tanh(Floats x) {
  const Floats square = x * x;
  Floats p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const Floats near = x + x * (square * p);
  const Ints sign = (Ints)x & splat_int(INT32_MIN);
  const Floats size = (Floats)((Ints)x ^ sign);
  const Floats far = splat(1.0f) - splat(2.0f) / (exp2(size * splat(2 * kLog2e)) + splat(1.0f));
  return size < splat(0.625f) ? near : (Floats)((Ints)far | sign);
}

// kLanes values of the bias from key position `position` on; lanes outside [begin, end) are not read.
DATTN_INLINE Floats load_bias(const Terms& t, std::int64_t row, std::int64_t position, std::int64_t step, std::int64_t begin,
                              std::int64_t end) {
  const std::int64_t at = row * t.bias_stride + position;
  const bool whole = step == 1 && begin <= 0 && end >= kLanes;
  if (t.bias_type == BiasType::kF32) {
    const auto* floats = static_cast<const float*>(t.bias) + at;
    if (whole) return load(floats);
    Floats part{};
    for (std::int64_t i = larger(begin, 0); i < smaller(end, kLanes); ++i) part[i] = floats[i * step];
    return part;
  }
  const auto* halves = static_cast<const HalfAlias*>(t.bias) + at;
  Halves part{};
  if (whole) {
    part = *reinterpret_cast<const HalvesAnywhere*>(halves);
  } else {
    for (std::int64_t i = larger(begin, 0); i < smaller(end, kLanes); ++i) part[i] = halves[i * step];
  }
  return t.bias_type == BiasType::kBF16 ? widen<Half>(part) : widen<Binary16>(part);
}

// `count` products q k^T of one row, from `key` on, become scores in place; `slope`, where not null, gets the derivative
// of the softcap.
static __attribute__((noinline)) void true_scores(const Terms& t, const Band& band, std::int64_t row, std::int64_t key,
                                                  std::int64_t count, float* scores, float* slope) {
  const std::int64_t query = band.q_position + (row - band.row_begin) * band.q_step;
  const std::int64_t position = band.k_position + (key - band.k_begin) * band.k_step;
  const bool inside = row >= band.row_begin && row < band.row_end;
  const Floats lanes = __builtin_convertvector(lane_numbers(), Floats) * splat(static_cast<float>(band.k_step));
  for (std::int64_t i = 0; i < count; i += kLanes) {
    Floats s = load(scores + i) * splat(t.factor);
    if (t.softcap != 0) {
      s = tanh(s);
      if (slope != nullptr) store(slope + i, splat(1.0f) - s * s);
      s *= splat(t.softcap);
    }
    const std::int64_t first = position + i * band.k_step;
    if (t.slope != 0) s += splat(t.slope) * (splat(static_cast<float>(first - query)) + lanes);
    if (t.bias != nullptr && inside) s += load_bias(t, row, first, band.k_step, band.k_begin - key - i, band.k_end - key - i);
    store(scores + i, s);
  }
}

// The same for a strip and a panel; `slopes` is [6][kPanel].
DATTN_INLINE void true_scores(const Terms& t, const Band& band, std::int64_t row, std::int64_t key, Block<kVectors>& block,
                              float* slopes) {
  alignas(64) float scores[kBlock * kPanel];
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(scores + r * kPanel + c * kLanes, block.v[r][c]);
  }
  for (int r = 0; r < kBlock; ++r) {
    true_scores(t, band, row + r, key, kPanel, scores + r * kPanel, slopes == nullptr ? nullptr : slopes + r * kPanel);
  }
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) block.v[r][c] = load(scores + r * kPanel + c * kLanes);
  }
}

// Adds what a band shows of a strip and a panel of dS to the gradient of the bias.
DATTN_INLINE void add_to_dbias(const Terms& t, const Band& band, std::int64_t row, std::int64_t key, const float* ds) {
  for (std::int64_t r = 0; r < kBlock; ++r, ds += kPanel) {
    const KeyRange range = keys_of_row(band, row + r);
    const std::int64_t begin = larger(range.begin, key), end = smaller(range.end, key + kPanel);
    float* to = t.dbias + (row + r) * t.dbias_stride + band.k_position;
    std::int64_t j = begin;
    if (band.k_step == 1) {
      for (; j + kLanes <= end; j += kLanes) {
        float* at = to + (j - band.k_begin);
        store(at, load(at) + load(ds + (j - key)));
      }
    }
    for (; j < end; ++j) to[(j - band.k_begin) * band.k_step] += ds[j - key];
  }
}

}  // namespace dattn::cpu::DATTN_ISA
