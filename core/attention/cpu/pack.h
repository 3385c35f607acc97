// Packing: operands are copied once into the order in which the micro-kernel reads them, converted to units and padded
// with zeros, so that the inner loops have no tails and no strides. Costs 1 to 3 % of a pass at 1k rows and more.
#pragma once

#include <utility>  // integer_sequence: a type, no code that another instruction set could share

#include "core/attention/cpu/micro.h"

namespace dattn::cpu::DATTN_ISA {

// kLanes units starting with unit u of a row of `dim` elements; 0 past the end.
template <class Storage, class Unit>
DATTN_INLINE Floats load_units(const Storage* row, std::int64_t u, std::int64_t dim) {
  const std::int64_t first = u * UnitOf<Unit>::kElements;
  const std::int64_t left = dim - first;
  constexpr std::int64_t kElements = kLanes * UnitOf<Unit>::kElements;
  if constexpr (sizeof(Storage) == 2 && UnitOf<Unit>::kElements == 1) {
    if (left >= kElements) return load_half<Storage>(row + first);
    return widen<Storage>(load_part_half(row + first, left));
  } else {
    return left >= kElements ? load(row + first) : load_part(row + first, left * static_cast<std::int64_t>(sizeof(Storage)));
  }
}

// Lane i takes lane i of `a` or, where i has bit kHalf, lane i - kHalf of `b`; kHalf lanes further up with kUpper.
template <int kHalf, bool kUpper, int... kLane>
DATTN_INLINE Floats interleave(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane + ((kLane & kHalf) != 0 ? kLanes - kHalf : 0) + (kUpper ? kHalf : 0))...);
}

// One of the log2(kLanes) steps of a square transpose: exchanges off-diagonal blocks of kHalf x kHalf.
template <int kHalf>
DATTN_INLINE void exchange(Floats (&v)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> kEveryLane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kHalf) != 0) continue;
    const Floats a = v[i], b = v[i + kHalf];
    v[i] = interleave<kHalf, false>(a, b, kEveryLane);
    v[i + kHalf] = interleave<kHalf, true>(a, b, kEveryLane);
  }
}

DATTN_INLINE void transpose(Floats (&v)[kLanes]) {
  exchange<1>(v);
  exchange<2>(v);
  if constexpr (kLanes > 4) exchange<4>(v);
  if constexpr (kLanes > 8) exchange<8>(v);
}

// Lane i: the sum of v[i]'s lanes. As the transpose, but what meets is added at once, so that half as many vectors are left.
template <int kHalf = 1>
DATTN_INLINE Floats sums_of(Floats (&v)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> kEveryLane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / kHalf; i += 2)
    v[i / 2] = interleave<kHalf, false>(v[i], v[i + 1], kEveryLane) + interleave<kHalf, true>(v[i], v[i + 1], kEveryLane);
  if constexpr (2 * kHalf < kLanes) return sums_of<2 * kHalf>(v);
  return v[0];
}

template <class Unit>
DATTN_INLINE Words sign_bits(bool negate) {
  const std::uint32_t bits = UnitOf<Unit>::kElements == 1 ? 0x80000000u : 0x80008000u;
  return (negate ? bits : 0u) - Words{};
}

template <class Storage, class Unit>
void pack_columns(const Rows& rows, bool negate, void* dst) {
  const auto* from = static_cast<const Storage*>(rows.data);
  auto* to = static_cast<Unit*>(dst);
  const std::int64_t n_units = units<Unit>(rows.dim);
  const Words sign = sign_bits<Unit>(negate);
  for (std::int64_t panel = 0; panel < rows.count; panel += kPanel, to += n_units * kPanel) {
    for (std::int64_t group = 0; group < kPanel; group += kLanes) {
      for (std::int64_t u = 0; u < n_units; u += kLanes) {
        Floats v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const std::int64_t row = panel + group + i;
          v[i] = row < rows.count ? load_units<Storage, Unit>(from + row * rows.stride, u, rows.dim) : Floats{};
        }
        transpose(v);
        for (int i = 0; i < kLanes && u + i < n_units; ++i) store(to + (u + i) * kPanel + group, (Floats)((Words)v[i] ^ sign));
      }
    }
  }
}

// Rows as columns of the micro-kernel, in groups of as many columns as it reads side by side: each group's rows lie behind each
// other, so that a product streams through them. (A group of wider rows would be one cache line in many: with AVX2 and D = 128
// their addresses share 8 of the first cache's 64 sets.)
template <class Storage, class Unit>
void pack_rows(const Rows& rows, std::int64_t padded_count, std::int64_t first_unit, std::int64_t all_units, void* dst) {
  const auto* from = static_cast<const Storage*>(rows.data);
  const std::int64_t width = padded(rows.dim);
  for (std::int64_t row = 0; row < padded_count; row += UnitOf<Unit>::kElements) {
    for (std::int64_t d = 0; d < width; d += kLanes) {
      Floats value = row < rows.count ? load_units<Storage, float>(from + row * rows.stride, d, rows.dim) : Floats{};
      if constexpr (UnitOf<Unit>::kElements == 2) {  // widened bf16: the upper halves of the words
        const Floats odd =
            row + 1 < rows.count ? load_units<Storage, float>(from + (row + 1) * rows.stride, d, rows.dim) : Floats{};
        value = (Floats)(((Words)value >> 16) | (Words)odd);
      }
      const std::int64_t group = d / kPanel * kPanel, group_width = smaller(kPanel, width - group);
      const std::int64_t unit = first_unit + row / UnitOf<Unit>::kElements;
      store(static_cast<Unit*>(dst) + group * all_units + unit * group_width + d - group, value);
    }
  }
}

// Rows as rows of the micro-kernel: [rows, padded to whole strips][units of dim, padded to whole vectors].
template <class Storage, class Unit>
DATTN_INLINE void pack_broadcast(const Rows& rows, Unit* to) {
  const auto* from = static_cast<const Storage*>(rows.data);
  const std::int64_t width = padded(units<Unit>(rows.dim));
  const std::int64_t count = round_up(rows.count, kStrip);
  for (std::int64_t row = 0; row < count; ++row, to += width) {
    for (std::int64_t u = 0; u < width; u += kLanes) {
      store(to + u, row < rows.count ? load_units<Storage, Unit>(from + row * rows.stride, u, rows.dim) : Floats{});
    }
  }
}

DATTN_INLINE void add_part(float* to, const float* from, float factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

static void add_rows(const float* from, std::int64_t from_stride, float factor, float* to, std::int64_t to_stride,
                     std::int64_t rows, std::int64_t dim) {
  const std::int64_t whole = dim / kLanes * kLanes;
  for (std::int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for (std::int64_t d = 0; d < whole; d += kLanes) store(to + d, load(to + d) + splat(factor) * load(from + d));
    add_part(to + whole, from + whole, factor, dim - whole);
  }
}

}  // namespace dattn::cpu::DATTN_ISA
