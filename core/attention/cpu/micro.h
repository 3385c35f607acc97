// The micro-kernel: 6 x (up to kVectors vectors) accumulators in registers += rows (broadcast) x columns (vectors),
// summed over units. All matrix products of the forward and the backward pass are this one.
#pragma once

#include "core/attention/cpu/ops.h"
#include "core/attention/cpu/simd.h"

namespace dattn::cpu::DATTN_ISA {

constexpr int kBlock = static_cast<int>(kStrip);

DATTN_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
DATTN_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
DATTN_INLINE std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }
DATTN_INLINE std::int64_t padded(std::int64_t dim) { return round_up(dim, kLanes); }
template <class Unit>
DATTN_INLINE std::int64_t units(std::int64_t elements) {
  return (elements + UnitOf<Unit>::kElements - 1) / UnitOf<Unit>::kElements;
}

template <int kWidth>
struct Block {
  Floats v[kBlock][kWidth];
};

template <int kWidth>
DATTN_INLINE void clear(Block<kWidth>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; ++c) acc.v[r][c] = Floats{};
  }
}

// acc[r][:] += sum over u < n of row r's unit u times columns[u][:]. Row r's unit u is at rows[r * stride + u], or, where
// the rows are stored transposed, at rows[u * stride + r].
template <bool kTransposed, int kWidth, class Unit>
DATTN_INLINE void multiply(Block<kWidth>& acc, const Unit* rows, std::int64_t stride, const Unit* columns,
                           std::int64_t column_stride, std::int64_t n) {
  const Unit* far = rows + 3 * stride;
  for (std::int64_t u = 0; u < n; ++u) {
    Floats column[kWidth];
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; ++c) column[c] = load(columns + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Floats row = broadcast(kTransposed ? rows + r : (r < 3 ? rows + r * stride : far + (r - 3) * stride));
#pragma GCC unroll 8
      for (int c = 0; c < kWidth; ++c) acc.v[r][c] = multiply_add<Unit>(row, column[c], acc.v[r][c]);
    }
    columns += column_stride;
    rows += kTransposed ? stride : 1;
    far += 1;
  }
}

// Calls body(integral constant width, first column) for the groups of kVectors vectors of a row of `columns` floats.
template <int kValue>
struct Width {
  static constexpr int value = kValue;
};
template <class Body>
DATTN_INLINE void for_column_groups(std::int64_t columns, const Body& body) {
  std::int64_t column = 0;
  for (; column + kPanel <= columns; column += kPanel) body(Width<kVectors>{}, column);
  const std::int64_t rest = (columns - column) / kLanes;
  if constexpr (kVectors > 2) {
    if (rest == 3) body(Width<3>{}, column);
    if (rest == 2) body(Width<2>{}, column);
  }
  if (rest == 1) body(Width<1>{}, column);
}

// A bump allocator over a job's scratch; started at 0 it counts the bytes.
struct Arena {
  std::uintptr_t next;
};
template <class T>
DATTN_INLINE T* take(Arena& arena, std::int64_t count) {
  T* memory = reinterpret_cast<T*>(arena.next);
  arena.next += static_cast<std::uintptr_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
  return memory;
}

}  // namespace dattn::cpu::DATTN_ISA
