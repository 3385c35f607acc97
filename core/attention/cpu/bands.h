// Which part of a strip of query rows a band shows, panel by panel, and the masking of the rest.
#pragma once

#include "core/attention/cpu/micro.h"

namespace dattn::cpu::DATTN_ISA {

// Keys that one row of a band sees; empty (begin >= end) for rows outside.
DATTN_INLINE KeyRange keys_of_row(const Band& band, std::int64_t row) {
  if (row < band.row_begin || row >= band.row_end) return {0, 0};
  if (band.ranges != nullptr) {
    const KeyRange range = band.ranges[row - band.row_begin];
    return {larger(band.k_begin, range.begin - band.first_key), smaller(band.k_end, range.end - band.first_key)};
  }
  return {larger(band.k_begin, row + band.lo), smaller(band.k_end, row + band.hi + 1)};
}

// What the 6 rows from `first` on see together, and what all of them see.
struct StripRange {
  KeyRange any, all;
};
DATTN_INLINE StripRange keys_of_strip(const Band& band, std::int64_t first) {
  const std::int64_t begin = larger(first, band.row_begin), last = smaller(first + kStrip, band.row_end) - 1;
  if (begin > last) return {{0, 0}, {0, 0}};
  const KeyRange upper = keys_of_row(band, begin), lower = keys_of_row(band, last);
  const bool whole = begin == first && last == first + kStrip - 1;
  return {{upper.begin, lower.end}, whole ? KeyRange{lower.begin, upper.end} : KeyRange{0, 0}};
}

DATTN_INLINE bool overlaps(KeyRange range, std::int64_t begin, std::int64_t end) {
  return larger(range.begin, begin) < smaller(range.end, end);
}
DATTN_INLINE bool covers(KeyRange range, std::int64_t begin, std::int64_t end) {
  return range.begin <= begin && range.end >= end;
}

// Keys [begin, end) of a band whose rows are those of strips that overlap it, in strips.
DATTN_INLINE std::int64_t first_strip(const Band& band) { return band.row_begin / kStrip; }
DATTN_INLINE std::int64_t end_strip(const Band& band) { return (band.row_end + kStrip - 1) / kStrip; }

// Scores of invisible pairs become `hidden`. Row 0 of the block is query row `first`, its first key is `key`.
template <int kWidth>
DATTN_INLINE void hide(Block<kWidth>& acc, const Band& band, std::int64_t first, std::int64_t key, float hidden) {
  const Ints lanes = lane_numbers();
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    const KeyRange range = keys_of_row(band, first + r);
    const Ints begin = splat_int(static_cast<std::int32_t>(larger(0, smaller(range.begin - key, kWidth * kLanes))));
    const Ints end = splat_int(static_cast<std::int32_t>(larger(0, smaller(range.end - key, kWidth * kLanes))));
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; ++c) {
      const Ints at = lanes + splat_int(c * kLanes);
      acc.v[r][c] = ((at >= begin) & (at < end)) ? acc.v[r][c] : splat(hidden);
    }
  }
}

}  // namespace dattn::cpu::DATTN_ISA
