// Forward pass of one block of query rows against all its keys: FlashAttention's online softmax (Dao et al., 2022), with a lazy
// maximum: m is that of the first keys that a row sees and stays.
//
//   for each band, for each 256 keys:   P = 2^(c Q K^T - m), l += sum P      c = |scale| log2(e); S never leaves registers
//                                       O += P V                             96 x 256 floats of P, in the L2 cache
//   out = O / l, lse = ln2 (m + log2 l)
//
// Any m gives the same out and lse as long as nothing overflows. Where l or O did, or came near it (later scores lie far above
// the first ones), the block is done again with a running maximum, as it is for invariant jobs:
//
//                                       S = Q K^T, row maxima on the way
//                                       P = 2^(c S - m), l = l 2^(m_old - m) + sum P
//                                       O = O 2^(m_old - m) + P V
#pragma once

#include "core/attention/cpu/bands.h"
#include "core/attention/cpu/pack.h"
#include "core/attention/cpu/terms_text.h"

namespace dattn::cpu::DATTN_ISA {

// The state of a block of rows while its keys pass by.
template <class Unit>
struct Forward {
  Unit* q;                // [rows][q_stride]
  std::int64_t q_stride;  // units
  std::int64_t q_units;   // units of D
  std::int64_t width;     // V padded
  float* scores;          // [rows][kScoreStride]: S, then P in place (as units)
  float* row_lanes;       // [rows][kLanes]: maxima of S by lane; l by lane with a lazy maximum
  float* top;             // [rows] m
  float* sum;             // [rows] l
  float* rescale;         // [rows] 2^(m_old - m)
  float* out;             // [rows][width] O
};

constexpr std::int64_t kScoreStride = kForwardKeys + 16;  // +16: rows do not share cache sets

template <class Unit>
DATTN_INLINE Forward<Unit> take_forward(Arena& arena, std::int64_t dim_qk, std::int64_t dim_v) {
  Forward<Unit> f;
  f.q_units = units<Unit>(dim_qk);
  f.q_stride = padded(f.q_units);
  f.width = padded(dim_v);
  f.q = take<Unit>(arena, kForwardRows * f.q_stride);
  f.scores = take<float>(arena, kForwardRows * kScoreStride);
  f.row_lanes = take<float>(arena, kForwardRows * kLanes);
  f.top = take<float>(arena, kForwardRows);
  f.sum = take<float>(arena, kForwardRows);
  f.rescale = take<float>(arena, kForwardRows);
  f.out = take<float>(arena, kForwardRows * f.width);
  return f;
}

template <class Unit>
std::int64_t forward_scratch(std::int64_t dim_qk, std::int64_t dim_v) {
  Arena arena{0};
  take_forward<Unit>(arena, dim_qk, dim_v);
  return static_cast<std::int64_t>(arena.next);
}

// P of one row's columns from `column` on, two vectors of them, as the units that P V reads.
template <class Unit>
DATTN_INLINE void store_probabilities(float* scores, std::int64_t column, Floats p0, Floats p1) {
#if defined(__AVX512BF16__)
  if constexpr (UnitOf<Unit>::kElements == 2) return store(scores + column / 2, to_pairs(p0, p1));
#endif
  store(scores + column, p0);
  store(scores + column + kLanes, p1);
}

// S of one strip and one panel, or half of one.
template <bool kTerms, int kWidth, class Unit>
DATTN_INLINE void score_panel(const Forward<Unit>& f, const ForwardJob& job, const Unit* columns, const Band& band,
                              std::int64_t row, std::int64_t key, bool hidden, Block<kWidth>& scores) {
  clear(scores);
  multiply<false>(scores, f.q + row * f.q_stride, f.q_stride, columns, kPanel, f.q_units);
  if constexpr (kTerms) {
    if (job.terms->scores) true_scores(*job.terms, band, row, key, scores, nullptr);
  }
  if (hidden) hide(scores, band, row, key, kMinusInfinity);
}

// S of one strip and one panel, with the maxima of its rows.
template <bool kTerms, class Unit>
DATTN_INLINE void score_block(const Forward<Unit>& f, const ForwardJob& job, const Unit* columns, const Band& band,
                              std::int64_t strip, std::int64_t key, std::int64_t column, bool first, bool hidden) {
  Block<kVectors> acc;
  const std::int64_t row = strip * kStrip;
  score_panel<kTerms>(f, job, columns, band, row, key, hidden, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    float* to = f.scores + (row + r) * kScoreStride + column;
    float* tops = f.row_lanes + (row + r) * kLanes;
    Floats top = first ? splat(kMinusInfinity) : load(tops);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      store(to + c * kLanes, acc.v[r][c]);
      top = at_least(top, acc.v[r][c]);
    }
    store(tops, top);
  }
}

// m of the rows that had none, from S of the first panel that they see.
template <int kWidth>
DATTN_INLINE void begin_rows(float* top, const Block<kWidth>& scores, float factor) {
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    if (top[r] != kMinusInfinity) continue;
    Floats highest = scores.v[r][0];
#pragma GCC unroll 8
    for (int c = 1; c < kWidth; ++c) highest = at_least(highest, scores.v[r][c]);
    top[r] = maximum_of(highest) * factor;
  }
}

// Bits of dropout for a strip and a panel, [6][kPanelBits]; the first key's is number `bit`. Null: none.
struct PanelBits {
  const unsigned char* bits;
  std::int64_t bit;
};
constexpr std::int64_t kPanelBits = keep_bytes(kPanel);

// P of one strip and one panel, or half of one, with the rows' m, and their sums, to which dropped keys belong.
template <bool kTerms, bool kHidden, int kWidth, class Unit>
DATTN_INLINE void probability_panel(const Forward<Unit>& f, float factor, std::int64_t row, std::int64_t column,
                                    const Block<kWidth>& scores, const PanelBits& keep) {
  constexpr bool kFinite = !kHidden && !kTerms;  // no score is -inf
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    const float top = f.top[row + r];
    const Floats minus_top = splat(!kFinite && top == kMinusInfinity ? 0.0f : -top);  // (-inf) - (-inf) would be NaN
    Floats p[kWidth];
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; ++c)
      p[c] = exp2<UnitOf<Unit>::kDegree, kFinite>(fused(scores.v[r][c], splat(factor), minus_top));
    Floats sum = p[0];
#pragma GCC unroll 8
    for (int c = 1; c < kWidth; ++c) sum += p[c];
    float* sums = f.row_lanes + (row + r) * kLanes;
    store(sums, load(sums) + sum);
    if constexpr (kTerms) {
      if (keep.bits != nullptr) {
#pragma GCC unroll 8
        for (int c = 0; c < kWidth; ++c) p[c] = keep_lanes(p[c], keep.bits + r * kPanelBits, keep.bit + c * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; c += 2)
      store_probabilities<Unit>(f.scores + (row + r) * kScoreStride, column + c * kLanes, p[c], p[c + 1]);
  }
}

// S and P of one strip and one panel, or half of one.
template <int kWidth, bool kTerms, class Unit>
DATTN_INLINE void lazy_block(const Forward<Unit>& f, const ForwardJob& job, const Unit* columns, const Band& band,
                             std::int64_t strip, std::int64_t key, std::int64_t column, bool hidden) {
  const std::int64_t row = strip * kStrip;
  unsigned char bits[kTerms ? kBlock * kPanelBits : 1];
  PanelBits keep{nullptr, 0};
  if constexpr (kTerms) {
    if (job.terms->drop_below != 0) {
      keep = {bits, first_bit(band, key)};
      keep_bits(*job.terms, band, row, kBlock, key, kPanel, bits, kPanelBits);
    }
  }
  Block<kWidth> acc;
  score_panel<kTerms>(f, job, columns, band, row, key, hidden, acc);
  begin_rows(f.top + row, acc, job.scale_log2);
  if (hidden)
    probability_panel<kTerms, true>(f, job.scale_log2, row, column, acc, keep);
  else
    probability_panel<kTerms, false>(f, job.scale_log2, row, column, acc, keep);
}

// P of columns [begin, end) of one row, in place. Returns its sum, to which dropped keys belong; their P becomes 0 then.
// `bits` holds column begin's at number `bit`.
template <bool kDropout, class Unit>
DATTN_INLINE float exponentiate(float* scores, std::int64_t begin, std::int64_t end, float factor, float minus_top,
                                const unsigned char* bits, std::int64_t bit) {
  const Floats c = splat(factor), m = splat(minus_top);
  Floats sum0{}, sum1{};
  for (std::int64_t i = begin; i < end; i += 2 * kLanes) {
    Floats p0 = exp2(fused(load(scores + i), c, m));
    Floats p1 = exp2(fused(load(scores + i + kLanes), c, m));
    sum0 += p0;
    sum1 += p1;
    if constexpr (kDropout) {
      p0 = keep_lanes(p0, bits, bit + i - begin);
      p1 = keep_lanes(p1, bits, bit + i - begin + kLanes);
    }
    store_probabilities<Unit>(scores, i, p0, p1);
  }
  return sum_of(sum0 + sum1);
}

// Softmax of one strip over columns [begin, end), the first of which is key `key`: m, l and the factor that O must be
// multiplied with.
template <bool kTerms, class Unit>
DATTN_INLINE void softmax_strip(const Forward<Unit>& f, const ForwardJob& job, const Band& band, std::int64_t strip,
                                std::int64_t key, std::int64_t begin, std::int64_t end) {
  const float factor = job.scale_log2;
  for (std::int64_t row = strip * kStrip; row < (strip + 1) * kStrip; ++row) {
    const float seen = maximum_of(load(f.row_lanes + row * kLanes)) * factor;
    const float old = f.top[row];
    const float top = seen > old ? seen : old;
    const float finite = top == kMinusInfinity ? 0.0f : top;  // (-inf) - (-inf) would be NaN
    f.top[row] = top;
    f.rescale[row] = top == old ? 1.0f : exp2(splat(old - finite))[0];
    float* scores = f.scores + row * kScoreStride;
    if constexpr (kTerms) {
      if (job.terms->drop_below != 0) {
        unsigned char bits[keep_bytes(kForwardKeys)];
        keep_bits(*job.terms, band, row, 1, key, end - begin, bits, 0);
        f.sum[row] = f.sum[row] * f.rescale[row] +
                     exponentiate<true, Unit>(scores, begin, end, factor, -finite, bits, first_bit(band, key));
        continue;
      }
    }
    f.sum[row] = f.sum[row] * f.rescale[row] + exponentiate<false, Unit>(scores, begin, end, factor, -finite, nullptr, 0);
  }
}

// O = O * rescale (1 with a lazy maximum) + P V for one strip, columns [begin, end) of P, the first of which is key `key`, and
// all columns of V.
template <bool kLazy, class Unit>
DATTN_INLINE void accumulate_strip(const Forward<Unit>& f, const ForwardJob& job, std::int64_t strip, std::int64_t key,
                                   std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kElements = UnitOf<Unit>::kElements;
  const std::int64_t row = strip * kStrip;
  const Unit* p = reinterpret_cast<const Unit*>(f.scores + row * kScoreStride) + begin / kElements;
  for_column_groups(
      f.width, [&](auto width, std::int64_t column) __attribute__((always_inline)) {
        Block<decltype(width)::value> acc;
        float* out = f.out + row * f.width + column;
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
          for (int c = 0; c < decltype(width)::value; ++c) {
            acc.v[r][c] = load(out + r * f.width + c * kLanes);
            if constexpr (!kLazy) acc.v[r][c] *= splat(f.rescale[row + r]);
          }
        }
        constexpr std::int64_t kGroup = decltype(width)::value * kLanes;
        const Unit* v = static_cast<const Unit*>(job.v_rows) + column * job.v_units + key / kElements * kGroup;
        multiply<false>(acc, p, kScoreStride, v, kGroup, (end - begin) / kElements);
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
          for (int c = 0; c < decltype(width)::value; ++c) store(out + r * f.width + c * kLanes, acc.v[r][c]);
        }
      });
}

// One band of a block: key blocks of kForwardKeys, aligned to panels, or, for invariant jobs, to their own size. What a
// row gets then depends on its keys alone: hidden keys in its strip add exact zeros, and never move a sum to another lane.
template <bool kTerms, bool kLazy, class Unit>
DATTN_INLINE void forward_band(const Forward<Unit>& f, const ForwardJob& job, const Band& band) {
  const auto* k_columns = static_cast<const Unit*>(job.k_columns);
  const std::int64_t step = kForwardKeys / kPanel;  // panels of one key block
  const std::int64_t end_panel = (band.k_end + kPanel - 1) / kPanel;
  const std::int64_t first_block = job.invariant ? band.k_begin / kForwardKeys * step : band.k_begin / kPanel;
  for (std::int64_t block = first_block; block < end_panel; block += step) {
    const std::int64_t block_end = smaller(block + step, end_panel);
    for (std::int64_t panel = block; panel < block_end; ++panel) {
      const std::int64_t key = panel * kPanel;
      for (std::int64_t strip = first_strip(band); strip < end_strip(band); ++strip) {
        const StripRange range = keys_of_strip(band, strip * kStrip);
        if (!overlaps(range.any, key, key + kPanel)) continue;
        const Unit* columns = k_columns + panel * f.q_units * kPanel;
        const bool hidden = !covers(range.all, key, key + kPanel);
        if constexpr (kLazy) {
          constexpr std::int64_t kHalf = kPanel / 2;
          const std::int64_t column = (panel - block) * kPanel;
          if constexpr (kVectors >= 4 && !kTerms) {
            const bool left = overlaps(range.any, key, key + kHalf), right = overlaps(range.any, key + kHalf, key + kPanel);
            if (!left || !right) {
              const std::int64_t half = right ? kHalf : 0;
              const bool cut = !covers(range.all, key + half, key + half + kHalf);
              lazy_block<kVectors / 2, kTerms>(f, job, columns + half, band, strip, key + half, column + half, cut);
              continue;
            }
          }
          lazy_block<kVectors, kTerms>(f, job, columns, band, strip, key, column, hidden);
        } else {
          const bool first = panel == block || !overlaps(range.any, key - kPanel, key);
          score_block<kTerms>(f, job, columns, band, strip, key, (panel - block) * kPanel, first, hidden);
        }
      }
    }
    for (std::int64_t strip = first_strip(band); strip < end_strip(band); ++strip) {
      const KeyRange any = keys_of_strip(band, strip * kStrip).any;
      const std::int64_t begin = larger(any.begin / kPanel, block), end = smaller((any.end + kPanel - 1) / kPanel, block_end);
      if (any.begin >= any.end || begin >= end) continue;
      if constexpr (!kLazy)
        softmax_strip<kTerms>(f, job, band, strip, begin * kPanel, (begin - block) * kPanel, (end - block) * kPanel);
      // P of the hidden keys before and behind is 0.
      constexpr std::int64_t kElements = UnitOf<Unit>::kElements;
      const std::int64_t first = larger(any.begin / kElements * kElements, begin * kPanel);
      const std::int64_t last = smaller(round_up(any.end, kElements), end * kPanel);
      accumulate_strip<kLazy>(f, job, strip, first, first - block * kPanel, last - block * kPanel);
    }
  }
}

// Writes the state of one row, or merges it into what stands there. Kept probabilities count `kept` times.
DATTN_INLINE void finish_row(const float* from, float top, float sum, float kept, std::int64_t dim, bool merge, float* out,
                             float* lse) {
  constexpr float kLn2 = 0.693147180559945309f;
  const float mine = sum == 0 ? kMinusInfinity : (top + __builtin_log2f(sum)) * kLn2;
  float take = sum == 0 ? 0.0f : kept / sum, keep = 0;
  float both = mine;
  if (merge && *lse != kMinusInfinity) {
    if (sum == 0) return;
    const float highest = mine > *lse ? mine : *lse;
    const float a = __builtin_expf(*lse - highest), b = __builtin_expf(mine - highest);
    both = highest + __builtin_logf(a + b);
    keep = a / (a + b);
    take *= b / (a + b);
  }
  *lse = both;
  for (std::int64_t d = 0; d < dim; ++d) out[d] = (keep == 0 ? 0.0f : keep * out[d]) + take * from[d];
}

// The states of all rows as they are.
template <class Unit>
DATTN_INLINE void write_states(const Forward<Unit>& f, const ForwardJob& job) {
  for (std::int64_t row = 0; row < job.q.count; ++row) {
    job.state.top[row] = f.top[row];
    job.state.sum[row] = f.sum[row];
    for (std::int64_t d = 0; d < f.width; d += kLanes)
      store(job.state.out + row * f.width + d, load(f.out + row * f.width + d));
  }
}

// m, l and O of all rows.
template <bool kTerms, bool kLazy, class Unit>
DATTN_INLINE void forward_bands(const Forward<Unit>& f, const ForwardJob& job) {
  const std::int64_t rows = round_up(job.q.count, kStrip);
  for (std::int64_t row = 0; row < rows; ++row) {
    f.top[row] = kMinusInfinity;
    f.sum[row] = 0;
    store(f.row_lanes + row * kLanes, Floats{});
    for (std::int64_t d = 0; d < f.width; d += kLanes) store(f.out + row * f.width + d, Floats{});
  }
  for (std::int64_t i = 0; i < job.n_bands; ++i) forward_band<kTerms, kLazy>(f, job, job.bands[i]);
}

// Whether the lazy maxima were near enough to the true ones; l of all rows.
template <class Unit>
DATTN_INLINE bool settle_lazy(const Forward<Unit>& f, std::int64_t rows) {
  constexpr float kLargest = 0x1p60f;  // of l: P may then be as large, and O still holds values of 2^60
  Floats off{};                        // 0, or NaN where O is not finite
  bool good = true;
  for (std::int64_t row = 0; row < rows; ++row) {
    f.sum[row] = sum_of(load(f.row_lanes + row * kLanes));
    good = good && f.sum[row] < kLargest;  // NaN is not
    for (std::int64_t d = 0; d < f.width; d += kLanes) off += load(f.out + row * f.width + d) * Floats{};
  }
  return good && sum_of(off) == 0;
}

template <bool kTerms, class Unit>
DATTN_INLINE void forward_rows(const Forward<Unit>& f, const ForwardJob& job) {
  if (!job.invariant) {
    forward_bands<kTerms, true>(f, job);
    if (settle_lazy(f, job.q.count)) return;
  }
  forward_bands<kTerms, false>(f, job);
}

template <class Storage, class Unit>
void forward(const ForwardJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  const Forward<Unit> f = take_forward<Unit>(arena, job.q.dim, job.dim_v);
  pack_broadcast<Storage, Unit>(job.q, f.q);
  if (job.terms == nullptr)
    forward_rows<false>(f, job);
  else
    forward_rows<true>(f, job);
  if (job.state.out != nullptr) return write_states(f, job);
  const float kept = job.terms == nullptr ? 1.0f : job.terms->keep;
  for (std::int64_t row = 0; row < job.q.count; ++row) {
    finish_row(f.out + row * f.width, f.top[row], f.sum[row], kept, job.dim_v, job.merge, job.out + row * job.out_stride,
               job.lse + row * job.lse_stride);
  }
}

}  // namespace dattn::cpu::DATTN_ISA
