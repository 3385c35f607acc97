// Backward pass of one block of query rows against one chunk of keys (Dao et al., "FlashAttention-2", 2023): the five
// products of a piece, with the probabilities recomputed from the final lse.
//
//   S = Q K^T, P = 2^(c S - lse log2 e)      dP = dO V^T, dS = P (dP - delta)      strip by strip, panel by panel
//   dV += P^T dO, dK += dS^T Q               6 keys at a time, P and dS read transposed
//   dQ = dS K                                6 rows at a time
#pragma once

#include "core/attention/cpu/bands.h"
#include "core/attention/cpu/pack.h"
#include "core/attention/cpu/terms_text.h"

namespace dattn::cpu::DATTN_ISA {

constexpr std::int64_t kTileStride = kBackwardKeys + 16;  // +16: rows do not share cache sets
constexpr std::int64_t kKeepStride = (keep_bytes(kBackwardKeys) + 63) / 64 * 64;

// Q and dO as rows (to broadcast) and as columns; P and dS as [row units][key] for the transposed products and dS as
// [row][key units] for dQ. In fp32 the two forms of dS are one, and those of Q and dO where the columns are one group.
template <class Unit>
struct Backward {
  static constexpr bool kPairs = UnitOf<Unit>::kElements == 2;
  std::int64_t q_units, v_units;    // units of D and V
  std::int64_t q_stride, v_stride;  // the same, padded
  std::int64_t q_width, v_width;    // D and V, padded
  Unit *q, *dout;                   // [rows][stride]
  Unit *q_columns, *dout_columns;   // as pack_rows leaves them, of kBackwardRows rows
  Unit *p, *ds_columns;             // [row units][kTileStride]
  Unit* ds;                         // [row][kTileStride]
  float *minus_lse, *delta;         // [rows], minus_lse in base 2
  unsigned char* keep;              // [rows][kKeepStride] a bit a key, under dropout
};

// A strip and a panel on the way from P to dS, [6][kPanel].
struct Between {
  float* p;      // before dropout; fp32 without terms reads it from Backward::p
  float* slope;  // derivative of the softcap
};

template <class Unit>
DATTN_INLINE bool has_columns_apart(std::int64_t width) {
  return Backward<Unit>::kPairs || width > kPanel;
}

template <class Unit>
DATTN_INLINE Backward<Unit> take_backward(Arena& arena, std::int64_t dim_qk, std::int64_t dim_v) {
  Backward<Unit> b;
  b.q_units = units<Unit>(dim_qk);
  b.v_units = units<Unit>(dim_v);
  b.q_stride = padded(b.q_units);
  b.v_stride = padded(b.v_units);
  b.q_width = padded(dim_qk);
  b.v_width = padded(dim_v);
  b.q = take<Unit>(arena, kBackwardRows * b.q_stride);
  b.dout = take<Unit>(arena, kBackwardRows * b.v_stride);
  b.p = take<Unit>(arena, kBackwardRows * kTileStride);
  b.ds = take<Unit>(arena, kBackwardRows * kTileStride);
  constexpr std::int64_t kRowUnits = kBackwardRows / UnitOf<Unit>::kElements;
  b.q_columns = has_columns_apart<Unit>(b.q_width) ? take<Unit>(arena, kRowUnits * b.q_width) : b.q;
  b.dout_columns = has_columns_apart<Unit>(b.v_width) ? take<Unit>(arena, kRowUnits * b.v_width) : b.dout;
  b.ds_columns = Backward<Unit>::kPairs ? take<Unit>(arena, kBackwardRows / 2 * kTileStride) : b.ds;
  b.minus_lse = take<float>(arena, kBackwardRows);
  b.delta = take<float>(arena, kBackwardRows);
  b.keep = take<unsigned char>(arena, kBackwardRows * kKeepStride);
  return b;
}

template <class Unit>
std::int64_t backward_scratch(std::int64_t dim_qk, std::int64_t dim_v) {
  Arena arena{0};
  take_backward<Unit>(arena, dim_qk, dim_v);
  return static_cast<std::int64_t>(arena.next);
}

// Stores 6 rows x one panel of P or dS as [row units][key].
template <class Unit>
DATTN_INLINE void store_columns(Unit* to, const Block<kVectors>& block) {
#if defined(__AVX512BF16__)
  if constexpr (UnitOf<Unit>::kElements == 2) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; r += 2) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c)
        store(to + r / 2 * kTileStride + c * kLanes, interleave_pairs(block.v[r][c], block.v[r + 1][c]));
    }
    return;
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(to + r * kTileStride + c * kLanes, block.v[r][c]);
  }
}

// Sets what dropout drops of a strip and a panel to 0.
template <class Unit>
DATTN_INLINE void keep_block(const Backward<Unit>& b, const Band& band, std::int64_t row, std::int64_t key,
                             Block<kVectors>& block) {
  const std::int64_t bit = first_bit(band, 0) + key;
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      block.v[r][c] = keep_lanes(block.v[r][c], b.keep + (row + r) * kKeepStride, bit + c * kLanes);
    }
  }
}

DATTN_INLINE void scale_block(Block<kVectors>& block, float factor) {
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) block.v[r][c] *= splat(factor);
  }
}

// From dS behind all terms to dS before them: the bias takes its gradient on the way. Uses up between.p.
DATTN_INLINE void gradients_of_terms(const Terms& t, const Band& band, std::int64_t row, std::int64_t key,
                                     const Between& between, Block<kVectors>& ds) {
  if (t.dbias != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) store(between.p + r * kPanel + c * kLanes, ds.v[r][c]);
    }
    add_to_dbias(t, band, row, key, between.p);
  }
  if (t.softcap == 0) return;
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) ds.v[r][c] *= load(between.slope + r * kPanel + c * kLanes);
  }
}

// From S to P; kFinite: no score is -inf. Keeps P where it is needed before dropout or before rounding.
template <bool kTerms, bool kFinite, class Unit>
DATTN_INLINE void exponentiate(const Backward<Unit>& b, float factor, std::int64_t row, const Between& between,
                               Block<kVectors>& block) {
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    const Floats minus_lse = splat(b.minus_lse[row + r]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      block.v[r][c] = exp2<UnitOf<Unit>::kDegree, kFinite>(fused(block.v[r][c], splat(factor), minus_lse));
      if constexpr (kTerms || Backward<Unit>::kPairs) store(between.p + r * kPanel + c * kLanes, block.v[r][c]);
    }
  }
}

// P of one strip and one panel.
template <bool kTerms, class Unit>
DATTN_INLINE void probability_block(const Backward<Unit>& b, const BackwardJob& job, const Band& band, std::int64_t strip,
                                    std::int64_t panel, bool hidden, const Between& between) {
  const std::int64_t row = strip * kStrip, key = panel * kPanel;
  Block<kVectors> acc;
  clear(acc);
  multiply<false>(acc, b.q + row * b.q_stride, b.q_stride, static_cast<const Unit*>(job.k_columns) + panel * b.q_units * kPanel,
                  kPanel, b.q_units);
  if constexpr (kTerms) {
    if (job.terms->scores) true_scores(*job.terms, band, row, key, acc, between.slope);
  }
  if (hidden) {
    hide(acc, band, row, key, kMinusInfinity);
    exponentiate<kTerms, false>(b, job.scale_log2, row, between, acc);
  } else {
    exponentiate<kTerms, !kTerms>(b, job.scale_log2, row, between, acc);
  }
  if constexpr (kTerms) {
    if (job.terms->drop_below != 0) keep_block(b, band, row, key, acc);
  }
  store_columns(b.p + row / UnitOf<Unit>::kElements * kTileStride + key, acc);
}

// dS of one strip and one panel, from P.
template <bool kTerms, class Unit>
DATTN_INLINE void gradient_block(const Backward<Unit>& b, const BackwardJob& job, const Band& band, std::int64_t strip,
                                 std::int64_t panel, const Between& between) {
  const std::int64_t row = strip * kStrip, key = panel * kPanel;
  Block<kVectors> acc;
  clear(acc);
  multiply<false>(acc, b.dout + row * b.v_stride, b.v_stride,
                  static_cast<const Unit*>(job.v_columns) + panel * b.v_units * kPanel, kPanel, b.v_units);
  if constexpr (kTerms) {
    if (job.terms->drop_below != 0) {
      keep_block(b, band, row, key, acc);
      scale_block(acc, job.terms->keep);
    }
  }
  constexpr bool kCopied = kTerms || Backward<Unit>::kPairs;
  const float* from = kCopied ? between.p : reinterpret_cast<const float*>(b.p + row * kTileStride + key);
  const std::int64_t stride = kCopied ? kPanel : kTileStride;
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    const Floats delta = splat(b.delta[row + r]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) acc.v[r][c] = load(from + r * stride + c * kLanes) * (acc.v[r][c] - delta);
  }
  if constexpr (kTerms) gradients_of_terms(*job.terms, band, row, key, between, acc);
#if defined(__AVX512BF16__)
  if constexpr (Backward<Unit>::kPairs) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; c += 2) {
        store(b.ds + (row + r) * kTileStride + (key + c * kLanes) / 2, to_pairs(acc.v[r][c], acc.v[r][c + 1]));
      }
    }
  }
#endif
  store_columns(b.ds_columns + row / UnitOf<Unit>::kElements * kTileStride + key, acc);
}

// sums [6 rows][width] += rows x columns over n units from `unit` of the `all_units` that pack_rows left in `columns`.
template <bool kTransposed, class Unit>
DATTN_INLINE void accumulate(float* sums, std::int64_t width, const Unit* rows, std::int64_t stride, const Unit* columns,
                             std::int64_t all_units, std::int64_t unit, std::int64_t n) {
  for_column_groups(
      width, [&](auto group, std::int64_t column) __attribute__((always_inline)) {
        Block<decltype(group)::value> acc;
        clear(acc);
        constexpr std::int64_t kGroup = decltype(group)::value * kLanes;
        multiply<kTransposed>(acc, rows, stride, columns + column * all_units + unit * kGroup, kGroup, n);
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) {
          float* to = sums + r * width + column;
#pragma GCC unroll 8
          for (int c = 0; c < decltype(group)::value; ++c) store(to + c * kLanes, load(to + c * kLanes) + acc.v[r][c]);
        }
      });
}

// Strips and panels of the piece that a band touches, half-open. Panels are widened to whole groups of kStrip keys, so
// that the transposed products never read a key that was not written.
struct Piece {
  std::int64_t strip, end_strip, panel, end_panel;
};
DATTN_INLINE Piece piece_of(const Band& band) {
  const std::int64_t begin = band.k_begin / kPanel * kPanel / kStrip * kStrip;
  const std::int64_t end = smaller(round_up(round_up(band.k_end, kPanel), kStrip), kBackwardKeys);
  return {first_strip(band), end_strip(band), begin / kPanel, (end + kPanel - 1) / kPanel};
}

// The bits of dropout for the rows and keys of a piece.
template <class Unit>
DATTN_INLINE void keep_band(const Backward<Unit>& b, const Terms& t, const Band& band) {
  for (std::int64_t row = band.row_begin; row < band.row_end; ++row) {
    const KeyRange range = keys_of_row(band, row);
    const std::int64_t begin = range.begin / kPanel * kPanel;  // whole bytes
    if (begin < range.end) keep_bits(t, band, row, 1, begin, range.end - begin, b.keep + row * kKeepStride + begin / 8, 0);
  }
}

template <bool kTerms, class Unit>
DATTN_INLINE void scores_of_band(const Backward<Unit>& b, const BackwardJob& job, const Band& band, const Piece& piece) {
  alignas(64) float p[kBlock * kPanel], slope[kTerms ? kBlock * kPanel : 1];
  const Between between{p, slope};
  Block<kVectors> zero;
  clear(zero);
  if constexpr (kTerms) {
    if (job.terms->drop_below != 0) keep_band(b, *job.terms, band);
  }
  for (std::int64_t panel = piece.panel; panel < piece.end_panel; ++panel) {
    const std::int64_t key = panel * kPanel;
    for (std::int64_t strip = piece.strip; strip < piece.end_strip; ++strip) {
      const StripRange range = keys_of_strip(band, strip * kStrip);
      if (!overlaps(range.any, key, key + kPanel)) {  // a group of keys may straddle a visible panel and this one
        const std::int64_t at = strip * kStrip / UnitOf<Unit>::kElements * kTileStride + key;
        store_columns(b.p + at, zero);
        store_columns(b.ds_columns + at, zero);
        continue;
      }
      probability_block<kTerms>(b, job, band, strip, panel, !covers(range.all, key, key + kPanel), between);
      gradient_block<kTerms>(b, job, band, strip, panel, between);
    }
  }
}

// dV += P^T dO and dK += dS^T Q: 6 keys at a time, over the strips that see any of them.
template <class Unit>
DATTN_INLINE void gradients_of_keys(const Backward<Unit>& b, const BackwardJob& job, const Band& band, const Piece& piece) {
  constexpr std::int64_t kElements = UnitOf<Unit>::kElements;
  for (std::int64_t key = band.k_begin / kStrip * kStrip; key < band.k_end; key += kStrip) {
    const std::int64_t from = larger(key, band.k_begin), to = smaller(key + kStrip, band.k_end);
    std::int64_t strip = piece.strip, end_strip = piece.end_strip;  // rows with key - hi <= row <= key - lo
    strip = larger(strip, (from - band.hi) / kStrip);
    end_strip = smaller(end_strip, (to - 1 - band.lo) / kStrip + 1);
    if (strip >= end_strip) continue;
    const std::int64_t unit = strip * kStrip / kElements, n = (end_strip - strip) * kStrip / kElements;
    accumulate<true>(job.dv + key * b.v_width, b.v_width, b.p + unit * kTileStride + key, kTileStride, b.dout_columns,
                     kBackwardRows / kElements, unit, n);
    accumulate<true>(job.dk + key * b.q_width, b.q_width, b.ds_columns + unit * kTileStride + key, kTileStride, b.q_columns,
                     kBackwardRows / kElements, unit, n);
  }
}

template <class Unit>
DATTN_INLINE void gradients_of_rows(const Backward<Unit>& b, const BackwardJob& job, const Band& band, const Piece& piece) {
  constexpr std::int64_t kElements = UnitOf<Unit>::kElements;
  for (std::int64_t strip = piece.strip; strip < piece.end_strip; ++strip) {
    const KeyRange any = keys_of_strip(band, strip * kStrip).any;
    if (any.begin >= any.end) continue;
    const std::int64_t unit = any.begin / kElements, end = (any.end + kElements - 1) / kElements;  // dS of other keys is 0
    accumulate<false>(job.dq + strip * kStrip * b.q_width, b.q_width, b.ds + strip * kStrip * kTileStride + unit, kTileStride,
                      static_cast<const Unit*>(job.k_rows), kBackwardKeys / kElements, unit, end - unit);
  }
}

template <class Storage, class Unit>
void backward(const BackwardJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  const Backward<Unit> b = take_backward<Unit>(arena, job.q.dim, job.dout.dim);
  const std::int64_t rows = round_up(job.q.count, kStrip);
  pack_broadcast<Storage, Unit>(job.q, b.q);
  pack_broadcast<Storage, Unit>(job.dout, b.dout);
  constexpr std::int64_t kRowUnits = kBackwardRows / UnitOf<Unit>::kElements;
  if (has_columns_apart<Unit>(b.q_width)) pack_rows<Storage, Unit>(job.q, rows, 0, kRowUnits, b.q_columns);
  if (has_columns_apart<Unit>(b.v_width)) pack_rows<Storage, Unit>(job.dout, rows, 0, kRowUnits, b.dout_columns);
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool inside = row < job.q.count;
    const float lse = inside ? job.lse[row * job.lse_stride] : kMinusInfinity;
    b.minus_lse[row] = lse == kMinusInfinity ? kFarBelow : -lse * kLog2e;  // nothing seen: P = 0
    b.delta[row] = inside ? job.delta[row * job.delta_stride] : 0.0f;
    for (std::int64_t d = 0; d < b.q_width && job.dq != nullptr; d += kLanes) store(job.dq + row * b.q_width + d, Floats{});
  }
  for (std::int64_t i = 0; i < job.n_bands; ++i) {
    const Band& band = job.bands[i];
    const Piece piece = piece_of(band);
    if (job.terms == nullptr)
      scores_of_band<false>(b, job, band, piece);
    else
      scores_of_band<true>(b, job, band, piece);
    if (job.dk != nullptr) gradients_of_keys(b, job, band, piece);
    if (job.dq != nullptr) gradients_of_rows(b, job, band, piece);
  }
}

}  // namespace dattn::cpu::DATTN_ISA
