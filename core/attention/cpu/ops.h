// The border between the drivers (portable code: what to compute, memory, threads) and the kernel texts (compiled once
// per instruction set: how). Plain structs and function pointers only, because code in this header is seen by files
// compiled for different instruction sets: an inline function here could be emitted with AVX-512 and picked by the
// linker for everybody.
//
// Units: the micro-kernels multiply 32-bit units: one fp32, or a pair of bf16 that lie side by side along the summed
// axis. "Columns" are operands read a vector at a time, "rows" operands of which one unit is broadcast.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dattn::cpu {

// Query rows of one register block: with four vectors of columns 24 sums, 4 columns and a broadcast row fill AVX-512's 32
// registers; with two, 12 sums do so with the 16 of others. Fewer rows leave multiply-adds waiting for loads.
inline constexpr std::int64_t kStrip = 6;
// Query rows of one forward task: 16 strips share a panel of keys that is in the first cache; more rows gain 2 % at most.
inline constexpr std::int64_t kForwardRows = 96;
// Keys whose P is held at once: 96 x 256 floats, a tenth of a second-level cache of 1 MiB, beside which K's and V's panels
// stay. For them O is loaded and stored once, which 64 keys would not hide. Blocks of the invariant mode, too.
inline constexpr std::int64_t kForwardKeys = 256;
// Query rows of one backward piece: P and dS of 96 x 384 floats (2 x 150 KiB) stay in the second-level cache.
inline constexpr std::int64_t kBackwardRows = 96;
// Keys of one backward task at most: Q and dO are packed anew for each, 4 to 7 % of a pass with 192 keys.
inline constexpr std::int64_t kBackwardKeys = 384;
// Up to this many query rows, keys are read once and never packed: packing them costs as much as reading them a few times.
inline constexpr std::int64_t kDecodeRows = 4;
// Keys that are scored before their values are read, at most.
inline constexpr std::int64_t kDecodeBlock = 512;

struct KeyRange {
  std::int64_t begin, end;  // half-open
};

// Visible keys of the query rows [row_begin, row_end) of a block: max(k_begin, row + lo) <= key < min(k_end, row + hi + 1).
// Rows count from the block's first, keys from the first packed key. Row r is at position q_position + (r - row_begin) *
// q_step, key j at k_position + (j - k_begin) * k_step.
struct Band {
  std::int64_t row_begin, row_end;
  std::int64_t k_begin, k_end;
  std::int64_t lo, hi;
  std::int64_t q_position, k_position, q_step, k_step;
  // Where steps differ, lo and hi cut nothing and row r sees ranges[r - row_begin], less first_key, cut to [k_begin, k_end).
  // Begins and ends ascend.
  const KeyRange* ranges;
  std::int64_t first_key;
};

enum class BiasType : std::uint8_t { kF32, kBF16, kF16 };

// ScoreTerms for the rows of one job; see terms_text.h and dropout_text.h.
struct Terms {
  bool scores;   // scores change: the job then works with true scores, and its scale_log2 is log2(e)
  float factor;  // |scale|, or |scale| / softcap
  float softcap;
  float slope;       // of ALiBi
  const void* bias;  // the job's first row; column = key position; null: none
  std::int64_t bias_stride;
  BiasType bias_type;
  float* dbias;  // like bias; null: not wanted
  std::int64_t dbias_stride;
  float keep;                         // 1 / (1 - dropout p)
  std::uint32_t drop_below;           // a pair is dropped where the upper 24 bits of its word are less; 0: no dropout
  std::uint32_t key[2], stream, row;  // Philox key and the first two words of the counter
};

// `count` rows of `dim` elements in storage type, `stride` elements apart.
struct Rows {
  const void* data;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t dim;
};

// A state that is not normalised, of some query rows: what split_states.h merges.
struct RowStates {
  float* out;  // [rows][V padded], without the factor keep
  float* top;  // [rows] an exponent of 2 that no larger score is far above; -inf where nothing was seen
  float* sum;  // [rows] of 2^(score - top)
};

// One block of query rows of one head against all its keys, or a part of them.
struct ForwardJob {
  Rows q;
  const void* k_columns;  // [panels][units of D][panel width]
  const void* v_rows;     // as pack_rows leaves them, of
  std::int64_t v_units;   // units of keys
  std::int64_t dim_v;
  const Band* bands;
  std::int64_t n_bands;
  float scale_log2;  // |scale| * log2(e); the sign is packed into the keys
  float* out;
  std::int64_t out_stride;
  float* lse;
  std::int64_t lse_stride;
  bool merge;
  RowStates state;     // where it has memory it is written, and out and lse are not
  bool invariant;      // key blocks start at multiples of kForwardKeys, whatever the bands are
  const Terms* terms;  // null: none
  std::byte* scratch;  // forward_scratch bytes, 64-byte aligned
};

// One block of query rows of one head against one chunk of keys.
struct BackwardJob {
  Rows q, dout;
  const float* lse;
  const float* delta;
  std::int64_t lse_stride, delta_stride;
  const void* k_columns;  // [panels][units of D][panel width]
  const void* v_columns;  // [panels][units of V][panel width]
  const void* k_rows;     // as pack_rows leaves them, of kBackwardKeys keys
  const Band* bands;
  std::int64_t n_bands;
  float scale_log2;
  float* dk;           // [chunk keys][D padded], without the factor scale; added to; null: dk and dv are not wanted
  float* dv;           // [chunk keys][V padded], without the factor keep; added to
  float* dq;           // [kBackwardRows][D padded], without the factor scale; overwritten; null: not wanted
  const Terms* terms;  // null: none
  std::byte* scratch;
};

// One query head of a decode job.
struct DecodeHead {
  Rows q;
  std::int64_t kv;     // which of the job's KV heads it reads
  const Terms* terms;  // null: none
  RowStates state;
};

// A few query rows (at most kDecodeRows) of all heads that read some KV heads, against a range of keys.
struct DecodeJob {
  Rows k, v;  // of the first KV head
  std::int64_t kv_heads;
  std::int64_t k_head, v_head;  // elements from one KV head to the next
  const DecodeHead* heads;      // in the order of their KV heads
  std::int64_t n_heads, rows;
  const Band* bands;
  std::int64_t n_bands;
  std::int64_t block;  // keys that are scored before their values are read: a multiple of the lanes, at most kDecodeBlock
  float scale_log2;
  bool negate;  // scores: the scale is negative
  std::byte* scratch;
};

// One storage type on one instruction set.
struct Ops {
  std::int64_t panel;           // keys of one panel; divides kForwardKeys and kBackwardKeys
  std::int64_t lanes;           // padding of a row, in elements
  std::int64_t units_per_word;  // elements summed in one unit: 1 or 2
  // dst [ceil(count / panel)][units of dim][panel]; keys past the end are 0; negate flips the sign.
  void (*pack_columns)(const Rows& rows, bool negate, void* dst);
  // dst [groups of `panel` columns, the last one narrower][all_units][columns of the group]: units from first_unit on, zeros
  // behind the rows up to `padded_count`. The columns of all groups together are dim padded.
  void (*pack_rows)(const Rows& rows, std::int64_t padded_count, std::int64_t first_unit, std::int64_t all_units, void* dst);
  std::int64_t (*forward_scratch)(std::int64_t dim_qk, std::int64_t dim_v);
  void (*forward)(const ForwardJob& job);
  std::int64_t (*backward_scratch)(std::int64_t dim_qk, std::int64_t dim_v);
  void (*backward)(const BackwardJob& job);
  std::int64_t (*decode_scratch)(std::int64_t dim_qk, std::int64_t dim_v, std::int64_t rows,
                                 std::int64_t kv_heads);  // rows of all heads
  void (*decode)(const DecodeJob& job);
  // to[row] += factor * from[row]; rows of `from` are `from_stride` apart.
  void (*add_rows)(const float* from, std::int64_t from_stride, float factor, float* to, std::int64_t to_stride,
                   std::int64_t rows, std::int64_t dim);
  double (*multiply_adds)(std::int64_t rounds);  // does nothing else, see peak_text.h; returns the FLOPs
};

// One instruction set: the operations for each storage type.
struct Path {
  const char* name;
  bool (*runs_here)();
  const Ops* fp32;
  const Ops* bf16;
  const Ops* fp16;  // widened to fp32 when packed
};

}  // namespace dattn::cpu
