// Backward pass in bf16, fp16 and TF32 on tensor cores of compute capability 8.0 and above, after FlashAttention-2 (Dao, 2023),
// as one text for two kinds of kernel, so that every sum has one owner and a fixed order. A block of 4 warps owns 64 rows,
// queries or keys, and goes through the columns (keys, or queries) that they see, 32 at a time (TF32: 16), the next ones on
// their way:
//
//            rows       columns     S = rows columns^T, dP likewise      sums
//   queries  Q, dO      K, V        P = 2^(S - lse), dS = P (dP - delta)  dQ += dS K
//   keys     K, V       Q, dO       the same, transposed                 dK += dS^T Q, dV += P^T dO
//
// P and dS go from one product into the next in registers.
#pragma once

#include "core/attention/cuda/launchers.h"
#include "core/attention/cuda/mma_text.h"

namespace dattn::cuda {

enum class Sums : std::uint8_t { kQueries, kKeysAndValues, kKeys, kValues };  // dq; dk and dv; one of them, for large dims

inline constexpr int kGradRows = kMmaWarps * kWarpTile;
template <Factor kFactor>
inline constexpr int kGradStep = kStepOf<kFactor, 32>;
template <int kStep>
using GradFragments = float[1][kStep / 8][4];

// Of a block, by the bytes of a row of q and of v.
template <int kQkBytes, int kVBytes, int kStep>
constexpr std::size_t backward_shared_bytes() {
  return kTileBytes<kQkBytes + kVBytes, kGradRows> + 2 * kTileBytes<kQkBytes + kVBytes, kStep>;
}

// The final statistics of a query: -lse in base 2, which is -inf where nothing was seen, so that P = 0; and delta.
struct QueryStatistics {
  float minus_lse, delta;
};
__device__ __forceinline__ QueryStatistics statistics_of(const GradParams& params, int b, int h, int query) {
  if (query >= params.problem.seq_q) return {minus_infinity(), 0.0f};
  const float lse = *element_of<const float>(params.lse, b, h, query);
  return {lse == minus_infinity() ? lse : -lse * kLog2e, *element_of<const float>(params.delta, b, h, query)};
}

// The (batch row, query head) pairs that a block goes through, ascending: those that share its part of dbias (queries), or
// the heads that read its keys. Worked out anew for each, which is cheaper than registers.
struct Share {
  int b, h;
  bool last;
};
template <bool kByKey>
__device__ __forceinline__ Share share_of(const AttendProblem& p, int i) {
  const int y = opaque(static_cast<int>(blockIdx.y)), z = opaque(static_cast<int>(blockIdx.z));
  if constexpr (kByKey) {
    const QueryHeads range = heads_of(p, y);
    return {z, range.begin + i, range.begin + i + 1 >= range.end};
  }
  const int heads = p.heads / static_cast<int>(gridDim.y), batch = p.batch / static_cast<int>(gridDim.z);
  return {z * batch + i / heads, y * heads + i % heads, i + 1 == heads * batch};
}

// Products become P (0 where dropped) and dS of the pairs of block row `block_row` + 8 i + lane / 4, in place. dbias takes its
// share on the way.
template <Sums kSums, Terms kTerms, int kStep>
__device__ __forceinline__ void finish_pairs(const GradParams& params, int share, const Steps<kStep>& step, int first_row,
                                             int block_row, GradFragments<kStep>& s, GradFragments<kStep>& dp) {
  constexpr bool kByKey = kSums != Sums::kQueries;
  const AttendProblem& p = params.problem;
  const BlockTable& blocks = kByKey ? params.keys : params.queries;
  const int lane = static_cast<int>(threadIdx.x) % 32, rows = kByKey ? p.seq_kv : p.seq_q;
  const Share now = share_of<kByKey>(p, share);
  const int b = now.b, h = now.h;
  const HeadTerms<float> head(p, b, h);
  const float factor = kTerms == Terms::kNone ? head.scale * kLog2e : kLog2e;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + block_row + i * 8 + lane / 4;
    std::uint32_t bits = step.bits(blocks, kGradRows, block_row + i * 8 + lane / 4, 0);
    if (kTerms != Terms::kNone && row >= rows) bits = 0;
    QueryStatistics statistics{};
    if (!kByKey) statistics = statistics_of(params, b, h, row);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      Dropper dropper(dropout_row(p.terms, b, h));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = step.first() + n * 8 + lane % 4 * 2 + j, query = kByKey ? column : row, key = kByKey ? row : column;
        if (kByKey) statistics = statistics_of(params, b, h, column);
        const bool seen = bit_of(bits, n, j);
        float &product = s[0][n][2 * i + j], &gradient = dp[0][n][2 * i + j];
        if constexpr (kTerms == Terms::kNone) {
          const float probability = seen ? exp2_fast(fmaf(product, factor, statistics.minus_lse)) : 0.0f;
          product = probability;
          gradient = probability * (gradient - statistics.delta);
        } else {
          float probability = 0.0f, ds = 0.0f;
          if (seen) {
            const Score<float> score = score_of(p.terms, head, product, query, key);
            probability = exp2_fast(fmaf(score.value, factor, statistics.minus_lse));
            bool kept = true;
            if constexpr (kTerms == Terms::kAll) {
              // Words are of one query: kept between keys, and no registers for them between queries.
              kept =
                  kByKey ? Dropper(dropout_row(p.terms, b, h)).keeps(p.terms, query, key) : dropper.keeps(p.terms, query, key);
            }
            ds = probability * ((kept ? gradient * static_cast<float>(p.terms.keep) : 0.0f) - statistics.delta);
            if (!kByKey && params.dbias.data != nullptr) {
              const Bias& dbias = params.dbias;
              static_cast<float*>(
                  dbias.data)[b * dbias.batch + query * dbias.row + h * dbias.head + p.terms.k_positions[key]] += ds;
            }
            ds *= score.slope;
            if (!kept) probability = 0.0f;
          }
          product = probability;
          gradient = ds;
        }
      }
    }
  }
}

// to += factor * sums, the product rounded first, so that heads added one by one are the same in one call and in several.
template <int kFragments>
__device__ __forceinline__ void add_sums(const Matrix& to, int b, int h, int row, int count, double factor,
                                         const float (&sums)[1][kFragments][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + i * 8 + lane / 4 >= count) continue;
    float* at = row_of<float>(to, b, row + i * 8 + lane / 4, h);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int d = n * 8 + lane % 4 * 2 + j;
        if (d < to.dim) at[d] += multiply_rounded(static_cast<float>(factor), sums[0][n][2 * i + j]);
      }
    }
  }
}

// Grid: blocks of rows; heads and batch rows of q, or of dbias where those are fewer; of k.
template <Factor kFactor, int kDimQk, int kDimV, Sums kSums, Terms kTerms>
__global__ void DATTN_LAUNCH_BOUNDS(kMmaThreads, 1) mma_backward(GradParams params) {
  constexpr bool kByKey = kSums != Sums::kQueries, kWithValues = kSums == Sums::kKeysAndValues || kSums == Sums::kValues;
  constexpr bool kWithDs = kSums != Sums::kValues;
  constexpr int kQkBytes = kDimQk * kFactorBytes<kFactor>, kVBytes = kDimV * kFactorBytes<kFactor>;
  constexpr int kStep = kGradStep<kFactor>, kBuffer = kTileBytes<kQkBytes + kVBytes, kStep>;
  DATTN_SHARED_MEMORY(shared);
  unsigned char* const row_tile = shared;                                         // Q or K
  unsigned char* const row_dp_tile = row_tile + kTileBytes<kQkBytes, kGradRows>;  // dO or V
  unsigned char* const buffers = row_dp_tile + kTileBytes<kVBytes, kGradRows>;    // two of K and V, or Q and dO
  const AttendProblem& p = params.problem;
  const BlockTable& blocks = kByKey ? params.keys : params.queries;
  const int row_block = blocks.order[blockIdx.x];
  const int first_row = row_block * kGradRows, warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpTile;
  if constexpr (kByKey) {
    const QueryHeads heads = heads_of(p, static_cast<int>(blockIdx.y));
    if (heads.begin >= heads.end) return;
  }
  if (blocks.offsets[row_block] == blocks.offsets[row_block + 1]) return;
  for (int share = 0;; ++share) {
    const Share now = share_of<kByKey>(p, share);
    const int b = now.b, h = now.h, kv = kv_head_of(p, h);
    Steps<kStep> step(blocks, row_block);
    const HeadRows<kFactor> q(p.q, b, h, p.seq_q), k(p.k, b, kv, p.seq_kv), v(p.v, b, kv, p.seq_kv),
        dout(params.dout, b, h, p.seq_q);
    const auto copy_step = [&](int first, int buffer) {
      copy_tile<kQkBytes, kStep>(kByKey ? q : k, first, buffers + buffer * kBuffer);
      copy_tile<kVBytes, kStep>(kByKey ? dout : v, first, buffers + buffer * kBuffer + kTileBytes<kQkBytes, kStep>);
      cp_async_commit();
    };
    __syncthreads();  // the last share's tiles have been read
    const bool new_rows = !kByKey || share == 0;
    if (new_rows) {
      copy_tile<kQkBytes, kGradRows>(kByKey ? k : q, first_row, row_tile);
      if (kWithDs) copy_tile<kVBytes, kGradRows>(kByKey ? v : dout, first_row, row_dp_tile);
    }
    copy_step(step.first(), 0);
    if (new_rows) {
      cp_async_wait<0>();
      round_tile<kFactor, kQkBytes, kGradRows>(row_tile);
      if (kWithDs) round_tile<kFactor, kVBytes, kGradRows>(row_dp_tile);
    }
    float by_ds[1][kWithDs ? kDimQk / 8 : 1][4] = {}, by_p[1][kWithValues ? kDimV / 8 : 1][4] = {};
    for (int buffer = 0; !step.done(); buffer ^= 1) {
      unsigned char* const tile = buffers + buffer * kBuffer;
      unsigned char* const dp_tile = tile + kTileBytes<kQkBytes, kStep>;
      cp_async_wait<0>();
      round_tile<kFactor, kQkBytes, kStep>(tile);
      round_tile<kFactor, kVBytes, kStep>(dp_tile);
      __syncthreads();  // this step's columns are here, and the last one's have been read
      Steps<kStep> next = step;
      next.next(blocks);
      if (!next.done()) copy_step(next.first(), buffer ^ 1);
      GradFragments<kStep> s, dp = {};
      multiply_tiles<kFactor, kQkBytes>(s, row_tile, warp_row, tile);
      if constexpr (kWithDs) multiply_tiles<kFactor, kVBytes>(dp, row_dp_tile, warp_row, dp_tile);
      finish_pairs<kSums, kTerms>(params, share, step, first_row, warp_row, s, dp);
      if constexpr (kWithValues) accumulate_tiles<kFactor, kDimV>(by_p, s, dp_tile);
      if constexpr (kWithDs) accumulate_tiles<kFactor, kDimQk>(by_ds, dp, tile);
      step = next;
    }
    const Share done = share_of<kByKey>(p, share);
    const int row = first_row + warp_row, count = kByKey ? p.seq_kv : p.seq_q;
    const int head = kByKey ? static_cast<int>(blockIdx.y) : done.h;
    const Matrix& to = kByKey ? params.dk : params.dq;
    if (kWithDs && to.data != nullptr) add_sums(to, done.b, head, row, count, p.scale, by_ds);
    if constexpr (kWithValues) add_sums(params.dv, done.b, head, row, count, p.terms.keep, by_p);
    if (done.last) return;
  }
}

template <Factor kFactor, int kDimQk, int kDimV, Sums kSums>
void launch_mma_backward(const GradParams& params, int heads, int batch, cudaStream_t stream) {
  const BlockTable& blocks = kSums == Sums::kQueries ? params.queries : params.keys;
  const dim3 grid(static_cast<unsigned>(blocks.count), static_cast<unsigned>(heads), static_cast<unsigned>(batch));
  constexpr int kWidth = kFactorBytes<kFactor>;
  constexpr std::size_t kBytes = backward_shared_bytes<kDimQk * kWidth, kDimV * kWidth, kGradStep<kFactor>>();
  static_assert(kBytes <= kMostSharedBytes);
  const auto start = [&](auto kernel) { launch(kernel, grid, dim3(kMmaThreads), kBytes, stream, params); };
  switch (terms_in(params.problem.terms)) {
    case Terms::kNone: return start(&mma_backward<kFactor, kDimQk, kDimV, kSums, Terms::kNone>);
    case Terms::kScores: return start(&mma_backward<kFactor, kDimQk, kDimV, kSums, Terms::kScores>);
    case Terms::kAll: return start(&mma_backward<kFactor, kDimQk, kDimV, kSums, Terms::kAll>);
  }
}

template <Factor kFactor, int kDimQk, int kDimV>
void launch_mma_backward(const GradParams& params, cudaStream_t stream) {
  const AttendProblem& p = params.problem;
  const Bias& dbias = params.dbias;
  if (params.dq.data != nullptr || dbias.data != nullptr) {
    launch_mma_backward<kFactor, kDimQk, kDimV, Sums::kQueries>(params, dbias.data != nullptr && dbias.head == 0 ? 1 : p.heads,
                                                                dbias.data != nullptr && dbias.batch == 0 ? 1 : p.batch,
                                                                stream);
  }
  if (params.dk.data == nullptr) return;
  if constexpr (kDimQk + kDimV <= 256) {
    launch_mma_backward<kFactor, kDimQk, kDimV, Sums::kKeysAndValues>(params, p.kv_heads, p.batch, stream);
  } else {  // both sums have no room in registers
    launch_mma_backward<kFactor, kDimQk, kDimV, Sums::kKeys>(params, p.kv_heads, p.batch, stream);
    launch_mma_backward<kFactor, kDimQk, kDimV, Sums::kValues>(params, p.kv_heads, p.batch, stream);
  }
}

template <int kDimQk, int kDimV>
void launch_mma_backward(const GradParams& params, cudaStream_t stream) {
  with_factor<kDimQk>(params.problem.storage,
                      [&](auto factor) { launch_mma_backward<decltype(factor)::value, kDimQk, kDimV>(params, stream); });
}

}  // namespace dattn::cuda
