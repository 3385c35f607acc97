// What the forward and the backward driver share: rows of one head, factors and terms, scratch of a thread.
#pragma once

#include <algorithm>

#include "core/attention/cpu/ops.h"
#include "core/attention/kernel.h"
#include "core/attention/positions.h"

namespace dattn::cpu {

void attend(const Path& path, const AttendArgs& args);
void attend_decode(const Path& path, const AttendArgs& args);  // for at most kDecodeRows query rows
void attend_grad(const Path& path, const AttendGradArgs& args);

inline std::int64_t padded_to(std::int64_t value, std::int64_t step) { return div_up(value, step) * step; }

inline const Ops& ops_for(const Path& path, DType storage) {
  switch (storage) {
    case DType::kBF16: return *path.bf16;
    case DType::kF16: return *path.fp16;
    default: return *path.fp32;
  }
}

// Rows [begin, begin + count) of head h of batch row b of a view [B, S, H, D].
Rows rows_of(const TensorView& view, std::int64_t b, std::int64_t begin, std::int64_t count, std::int64_t h);

// The smallest range of key rows that holds every tile and begins at a multiple of `block`.
Interval key_hull(std::span<const Tile> tiles, std::int64_t block = 1);

// What the kernels multiply their scores with to get exponents of 2: log2(e) where terms make true scores, else |scale| *
// log2(e), never 0, so that a hidden score of -inf stays -inf.
float base2_factor(double scale, const ScoreTerms& terms);

// The terms of the query rows from `row` on of local batch row b and query head h.
Terms terms_of(const ScoreTerms& terms, double scale, const HeadMap& heads, std::int64_t b, std::int64_t row, std::int64_t h);

// Element (b, row, h, position 0) of a bias or its gradient [B or 1, S, H or 1, N].
std::byte* bias_row(const TensorView& bias, std::int64_t b, std::int64_t row, std::int64_t h);

// This thread's scratch, at least `bytes`, 64-byte aligned; kept until the thread ends.
std::byte* scratch(std::int64_t bytes);

}  // namespace dattn::cpu
