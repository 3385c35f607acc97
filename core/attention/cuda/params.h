// What attention kernels are told: plain structs, filled by cuda_kernel.cpp, read on the device. Pointers are to device
// memory; strides are in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/attention/block_list.h"

namespace dattn::cuda {

enum class Storage : std::uint8_t { kF32, kBF16, kF16, kF64 };

// [B, S, H, D], last axis contiguous.
struct Matrix {
  void* data;
  std::int64_t batch, row, head;
  std::int32_t dim;
};

// [B, H, S]
struct Statistic {
  void* data;
  std::int64_t batch, head, row;
};

// [B or 1, S, H or 1, positions]; strides of shared axes are 0.
struct Bias {
  void* data;  // null: none
  std::int64_t batch, row, head;
  Storage storage;
};

// core/attention/block_list.h in device memory.
struct BlockTable {
  const std::int32_t* offsets;
  const BlockPiece* pieces;
  const std::uint64_t* masks;
  const std::int32_t* order;
  std::int32_t count;
};

// core/attention/kernel.h ScoreTerms.
struct ScoreParams {
  double softcap;
  const double* slopes;  // by local query head; null: none
  Bias bias;
  std::uint32_t drop_below;           // 0: no dropout; see core/attention/dropout.h
  std::uint32_t key[2], stream, row;  // Philox key; counter words: `row` is that of local batch row 0 and head 0
  std::uint32_t heads;                // counter rows from one batch row to the next
  double keep;                        // 1 / (1 - p)
  const std::int64_t* q_positions;    // by local row; null where no term needs them
  const std::int64_t* k_positions;
};

struct AttendProblem {
  Storage storage;
  Matrix q, k, v;
  std::int32_t batch, seq_q, seq_kv, heads, kv_heads;
  std::int64_t q_begin, kv_begin, group;  // HeadMap
  double scale;
  ScoreParams terms;
};

struct AttendParams {
  AttendProblem problem;
  BlockTable blocks;  // of queries
  Matrix out;
  Statistic lse;
  bool merge;
  // Elements of out and lse from the state of one block of the list to the next, where all of them are of the same rows, from
  // 0 on, and see a share of the keys each. 0: blocks of rows, one after the other.
  std::int64_t share_out, share_lse;
};

// States of the same rows by shares of the keys, to be merged in ascending order.
struct SharesParams {
  Matrix shares, out;
  Statistic shares_lse, lse;
  std::int64_t share_out, share_lse;
  std::int32_t count, batch, seq_q, heads;
  bool fp64, merge;  // merge: into what stands in out and lse, too
};

struct GradParams {
  AttendProblem problem;
  Matrix dout;
  Statistic lse, delta;
  BlockTable queries, keys;  // blocks of queries for dq and dbias, of keys for dk and dv
  Matrix dq, dk, dv;         // null: not wanted
  Bias dbias;                // in the accumulator type
};

// The terms that a kernel is compiled for.
enum class Terms : std::uint8_t { kNone, kScores, kAll };  // kScores: softcap, ALiBi, bias; kAll: dropout beside them
inline Terms terms_in(const ScoreParams& terms) {
  if (terms.drop_below != 0) return Terms::kAll;
  return terms.softcap != 0 || terms.slopes != nullptr || terms.bias.data != nullptr ? Terms::kScores : Terms::kNone;
}

// Rows [row, row + count) hold positions position, position + step, ..
struct PositionRun {
  std::int64_t position, step;
  std::int32_t row, count;
};

}  // namespace dattn::cuda
