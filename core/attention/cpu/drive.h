// What the forward and the backward driver share: rows of one head, bands of a block, scratch of a thread.
#pragma once

#include <algorithm>
#include <vector>

#include "core/attention/cpu/ops.h"
#include "core/attention/kernel.h"

namespace dattn::cpu {

void attend(const Path& path, const AttendArgs& args);
void attend_decode(const Path& path, const AttendArgs& args);  // for at most kDecodeRows query rows
void attend_grad(const Path& path, const AttendGradArgs& args);

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t padded_to(std::int64_t value, std::int64_t step) { return ceil_div(value, step) * step; }

inline const Ops& ops_for(const Path& path, DType storage) { return storage == DType::kBF16 ? *path.bf16 : *path.fp32; }

// Rows [begin, begin + count) of head h of batch row b of a view [B, S, H, D].
Rows rows_of(const TensorView& view, std::int64_t b, std::int64_t begin, std::int64_t count, std::int64_t h);

// The smallest range of key rows that holds every tile.
Interval key_hull(std::span<const Tile> tiles);

// Element i: the bands of query rows [i * block_rows, ..), with rows counted from the block's first row and keys from
// `first_key`.
std::vector<std::vector<Band>> bands_by_block(std::span<const Tile> tiles, std::int64_t seq_q, std::int64_t block_rows,
                                              std::int64_t first_key);

// The bands of a block inside the keys [begin, end), with keys counted from `begin`.
void bands_in_range(const std::vector<Band>& block, std::int64_t begin, std::int64_t end, std::vector<Band>& bands);

// |scale| * log2(e), never 0, so that a hidden score of -inf stays -inf when multiplied with it.
float base2_factor(double scale);

// This thread's scratch, at least `bytes`, 64-byte aligned; kept until the thread ends.
std::byte* scratch(std::int64_t bytes);

}  // namespace dattn::cpu
