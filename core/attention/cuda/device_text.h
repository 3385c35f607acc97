// What all attention kernels share on the device: elements, the walk over a block list, score terms, dropout, states.
#pragma once

#include "core/attention/cuda/params.h"
#include "core/base/dtype.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/ptx.h"

namespace dattn::cuda {

inline constexpr float kLog2e = 1.44269504088896341f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Elements of storage types as numbers of the sum's type.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) { return widen_f16(x.bits); }

template <class T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ float base_2_log(float x) { return log2f(x); }
__device__ __forceinline__ double base_2_log(double x) { return log2(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

template <class T>
__device__ __forceinline__ T* row_of(const Matrix& m, int b, int row, int h) {
  return static_cast<T*>(m.data) + b * m.batch + row * m.row + h * m.head;
}
template <class T>
__device__ __forceinline__ T* element_of(const Statistic& s, int b, int h, int row) {
  return static_cast<T*>(s.data) + b * s.batch + h * s.head + row * s.row;
}

__device__ __forceinline__ int kv_head_of(const AttendProblem& p, int h) {
  return static_cast<int>((p.q_begin + h) / p.group - p.kv_begin);
}

// Query heads [begin, end) of this call that read KV head kv.
struct QueryHeads {
  int begin, end;
};
__device__ __forceinline__ QueryHeads heads_of(const AttendProblem& p, int kv) {
  const std::int64_t begin = (p.kv_begin + kv) * p.group - p.q_begin, end = begin + p.group;
  return {static_cast<int>(begin < 0 ? 0 : begin), static_cast<int>(end > p.heads ? p.heads : end)};
}

// The blocks of columns that a block of rows sees, ascending. The same for all threads of a block.
struct Walk {
  std::int32_t piece, end, block;

  __device__ __forceinline__ Walk(const BlockTable& blocks, int row_block)
      : piece(blocks.offsets[row_block]), end(blocks.offsets[row_block + 1]), block(0) {
    if (piece != end) block = blocks.pieces[piece].begin;
  }
  __device__ __forceinline__ bool done() const { return piece == end; }
  __device__ __forceinline__ int mask(const BlockTable& blocks) const { return blocks.pieces[piece].mask; }
  __device__ __forceinline__ void next(const BlockTable& blocks) {
    if (++block < blocks.pieces[piece].end) return;
    ++piece;
    if (piece != end) block = blocks.pieces[piece].begin;
  }
};

// The word of dropout's counter that stands for a query head of a batch row.
__device__ __forceinline__ std::uint32_t dropout_row(const ScoreParams& terms, int b, int h) {
  return terms.row + static_cast<std::uint32_t>(b) * terms.heads + static_cast<std::uint32_t>(h);
}

// The terms of one query head of one batch row.
template <class Sum>
struct HeadTerms {
  Sum scale, softcap, per_softcap, slope;
  std::int64_t bias;  // of query row 0 at position 0

  __device__ __forceinline__ HeadTerms(const AttendProblem& p, int b, int h)
      : scale(static_cast<Sum>(p.scale)),
        softcap(static_cast<Sum>(p.terms.softcap)),
        per_softcap(p.terms.softcap != 0 ? static_cast<Sum>(p.scale / p.terms.softcap) : Sum(0)),
        slope(p.terms.slopes != nullptr ? static_cast<Sum>(p.terms.slopes[h]) : Sum(0)),
        bias(b * p.terms.bias.batch + h * p.terms.bias.head) {}
};

__device__ __forceinline__ double load_bias(const Bias& bias, std::int64_t at) {
  switch (bias.storage) {
    case Storage::kBF16: return widen(static_cast<const BFloat16*>(bias.data)[at]);
    case Storage::kF16: return widen(static_cast<const Float16*>(bias.data)[at]);
    case Storage::kF64: return static_cast<const double*>(bias.data)[at];
    default: return static_cast<const float*>(bias.data)[at];
  }
}

// A score from q k^T, and the derivative of the softcap there. The pair must be visible.
template <class Sum>
struct Score {
  Sum value, slope;
};
template <class Sum>
__device__ __forceinline__ Score<Sum> score_of(const ScoreParams& terms, const HeadTerms<Sum>& head, Sum product, int query,
                                               int key) {
  Score<Sum> score{product * head.scale, Sum(1)};
  if (terms.softcap != 0) {
    const Sum t = hyperbolic_tangent(product * head.per_softcap);
    score = {head.softcap * t, Sum(1) - t * t};
  }
  if (terms.slopes != nullptr) {
    score.value += head.slope * static_cast<Sum>(terms.k_positions[key] - terms.q_positions[query]);
  }
  if (terms.bias.data != nullptr) {
    score.value += static_cast<Sum>(load_bias(terms.bias, head.bias + query * terms.bias.row + terms.k_positions[key]));
  }
  return score;
}

// Philox4x32-10 (core/base/philox.h).
struct PhiloxWords {
  std::uint32_t word[4];
};
__device__ __forceinline__ PhiloxWords philox(const std::uint32_t (&key)[2], PhiloxWords c) {
  std::uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c.word[0], b = std::uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.word[1] ^ k0, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.word[3] ^ k1, static_cast<std::uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Dropout's words; those of a query and four neighbouring key positions are kept until others are asked for.
struct Dropper {
  std::uint32_t row, counter;
  int of_query;
  PhiloxWords words;

  __device__ __forceinline__ explicit Dropper(std::uint32_t dropout_row)
      : row(dropout_row), counter(0), of_query(-1), words{} {}

  // Does dropout keep the pair?
  __device__ __forceinline__ bool keeps(const ScoreParams& terms, int query, int key) {
    const std::int64_t position = terms.k_positions[key];
    const auto wanted = static_cast<std::uint32_t>(position >> 2);
    if (query != of_query || wanted != counter) {
      of_query = query;
      counter = wanted;
      words = philox(terms.key, {{terms.stream, row, static_cast<std::uint32_t>(terms.q_positions[query]), counter}});
    }
    const bool upper = (position & 2) != 0, odd = (position & 1) != 0;
    const std::uint32_t word = upper ? (odd ? words.word[3] : words.word[2]) : (odd ? words.word[1] : words.word[0]);
    return word >> 8 >= terms.drop_below;
  }
};

// Where the rows of a block of the list begin.
__device__ __forceinline__ int first_row_of(const AttendParams& params, int block, int block_rows) {
  return params.share_out != 0 ? 0 : block * block_rows;
}

// One row's result, not normalised, beside the state that stands there: out = keep * out + take * sums.
template <class Sum>
struct Merge {
  Sum lse, keep, take;
};
// top: maximum in base 2, -inf where nothing was seen; kept: dropout's factor.
template <class Sum>
__device__ __forceinline__ Merge<Sum> merge_of(Sum top, Sum sum, Sum kept, bool merge, Sum old) {
  const Sum none = static_cast<Sum>(minus_infinity());
  const Sum mine = sum == Sum(0) ? none : (top + base_2_log(sum)) * static_cast<Sum>(0.69314718055994530942);
  const Sum take = sum == Sum(0) ? Sum(0) : kept / sum;
  if (!merge || old == none) return {mine, Sum(0), take};
  if (sum == Sum(0)) return {old, Sum(1), Sum(0)};
  const Sum log2e = static_cast<Sum>(1.44269504088896340736);
  const Sum highest = mine > old ? mine : old;
  const Sum a = power_of_2((old - highest) * log2e), b = power_of_2((mine - highest) * log2e);
  return {highest + base_2_log(a + b) * static_cast<Sum>(0.69314718055994530942), a / (a + b), take * b / (a + b)};
}

}  // namespace dattn::cuda
