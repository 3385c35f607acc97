// Forward pass in bf16, fp16 and TF32 on tensor cores of compute capability 8.0 and above: FlashAttention-2 (Dao, 2023). A
// block of 4 warps owns 64 kTiles query rows of one head and goes through its keys kStep at a time, S, P and O in registers,
// while the next keys and values are on their way to the other one of two buffers.
#pragma once

#include "core/attention/cuda/launchers.h"
#include "core/attention/cuda/mma_text.h"

namespace dattn::cuda {

// Of a block, by the bytes of a row of q and of v.
template <int kQkBytes, int kVBytes, int kTiles, int kStep>
constexpr std::size_t forward_shared_bytes() {
  return kTileBytes<kQkBytes, kMmaWarps * kWarpTile * kTiles> + 2 * kTileBytes<kQkBytes + kVBytes, kStep>;
}

// What a warp knows of its rows: m and l of rows 8 half + lane / 4 of each tile of 16; l is the lane's share of it.
template <int kTiles>
struct Softmax {
  float top[kTiles][2], sum[kTiles][2];
};

// Products become scores in base 2 where terms change them; hidden pairs become -inf.
template <Terms kTerms, int kTiles, int kStep>
__device__ __forceinline__ void finish_scores(const AttendParams& params, const Steps<kStep>& step, int block_row,
                                              int first_row, float (&s)[kTiles][kStep / 8][4]) {
  constexpr int kRows = kMmaWarps * kWarpTile * kTiles;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (kTerms == Terms::kNone && step.walk.mask(params.blocks) < 0) return;
  const HeadTerms<float> head(params.problem, opaque(static_cast<int>(blockIdx.z)), opaque(static_cast<int>(blockIdx.y)));
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = block_row + m * kWarpTile + i * 8 + lane / 4;
      std::uint32_t bits[(kStep + 31) / 32];
#pragma unroll
      for (int word = 0; word < (kStep + 31) / 32; ++word) {
        bits[word] = step.bits(params.blocks, kRows, row, word);
        if (kTerms != Terms::kNone && first_row + row >= params.problem.seq_q) bits[word] = 0;
      }
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[m][n][2 * i + j];
          const bool seen = bit_of(bits[n / 4], n, j);
          if constexpr (kTerms != Terms::kNone) {
            const int key = step.first() + n * 8 + lane % 4 * 2 + j;
            if (seen) x = score_of(params.problem.terms, head, x, first_row + row, key).value * kLog2e;
          }
          x = seen ? x : minus_infinity();
        }
      }
    }
  }
}

// P = 2^(factor S - m) in place. Returns in `rescale` what O must be multiplied with.
template <int kTiles, int kFragments>
__device__ __forceinline__ void exponentiate(Softmax<kTiles>& softmax, float factor, float (&s)[kTiles][kFragments][4],
                                             float (&rescale)[kTiles][2]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float seen = minus_infinity();
#pragma unroll
      for (int n = 0; n < kFragments; ++n) seen = fmaxf(seen, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
      const float top = fmaxf(softmax.top[m][i], row_maximum(seen) * factor);
      const float finite = top == minus_infinity() ? 0.0f : top;  // (-inf) - (-inf) would be NaN
      rescale[m][i] = exp2_fast(softmax.top[m][i] - finite);
      softmax.top[m][i] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[m][n][2 * i + j];
          x = exp2_fast(fmaf(x, factor, -finite));
          sum += x;
        }
      }
      softmax.sum[m][i] = fmaf(softmax.sum[m][i], rescale[m][i], sum);
    }
  }
}

// Dropped probabilities become 0.
template <int kTiles, int kFragments>
__device__ __forceinline__ void drop(const AttendProblem& p, int row, int first_key, float (&s)[kTiles][kFragments][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint32_t dropper_row = dropout_row(p.terms, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = row + m * kWarpTile + i * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
        Dropper dropper(dropper_row);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first_key + n * 8 + lane % 4 * 2 + j;
          float& x = s[m][n][2 * i + j];
          if (x != 0.0f && query < p.seq_q && key < p.seq_kv && !dropper.keeps(p.terms, query, key)) x = 0.0f;
        }
      }
    }
  }
}

// Writes the rows' states, or merges them into what stands there.
template <int kDimV, int kTiles>
__device__ __forceinline__ void finish_rows(const AttendParams& params, int b, int h, int block, int row,
                                            const Softmax<kTiles>& softmax, const float (&out)[kTiles][kDimV / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = row + m * kWarpTile + i * 8 + lane / 4;
      const float sum = row_sum(softmax.sum[m][i]);
      const bool inside = query < params.problem.seq_q;
      float* lse = element_of<float>(params.lse, b, h, inside ? query : 0) + block * params.share_lse;
      const Merge<float> merge =
          merge_of(softmax.top[m][i], sum, static_cast<float>(params.problem.terms.keep), params.merge, inside ? *lse : 0.0f);
      __syncwarp();  // all lanes have read it
      if (!inside) continue;
      if (lane % 4 == 0) *lse = merge.lse;
      float* to = row_of<float>(params.out, b, query, h) + block * params.share_out;
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int d = n * 8 + lane % 4 * 2 + j;
          if (d < params.out.dim) to[d] = (merge.keep == 0.0f ? 0.0f : merge.keep * to[d]) + merge.take * out[m][n][2 * i + j];
        }
      }
    }
  }
}

// O = O * rescale, where that changes anything.
template <int kTiles, int kFragments>
__device__ __forceinline__ void rescale_rows(const float (&rescale)[kTiles][2], float (&out)[kTiles][kFragments][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    if (rescale[m][0] == 1.0f && rescale[m][1] == 1.0f) continue;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][n][j] *= rescale[m][j / 2];
    }
  }
}

template <Factor kFactor, int kDimQk, int kDimV, int kTiles, int kStep, Terms kTerms>
__global__ void DATTN_LAUNCH_BOUNDS(kMmaThreads, 1) mma_forward(AttendParams params) {
  constexpr int kQkBytes = kDimQk * kFactorBytes<kFactor>, kVBytes = kDimV * kFactorBytes<kFactor>;
  constexpr int kRows = kMmaWarps * kWarpTile * kTiles, kBuffer = kTileBytes<kQkBytes + kVBytes, kStep>;
  DATTN_SHARED_MEMORY(shared);
  unsigned char* const q_tile = shared;
  unsigned char* const buffers = q_tile + kTileBytes<kQkBytes, kRows>;  // two of K and V
  const AttendProblem& p = params.problem;
  const int row_block = params.blocks.order[blockIdx.x], h = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int first_row = first_row_of(params, row_block, kRows),
            warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpTile * kTiles;
  const int kv = kv_head_of(p, h);
  const HeadRows<kFactor> q(p.q, b, h, p.seq_q), k(p.k, b, kv, p.seq_kv), v(p.v, b, kv, p.seq_kv);
  // -inf times 0 would be NaN.
  const float factor = kTerms == Terms::kNone ? fmaxf(static_cast<float>(p.scale) * kLog2e, 1.17549435e-38f) : 1.0f;
  Softmax<kTiles> softmax;
  float out[kTiles][kDimV / 8][4] = {};
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    softmax.top[m][0] = softmax.top[m][1] = minus_infinity();
    softmax.sum[m][0] = softmax.sum[m][1] = 0.0f;
  }
  Steps<kStep> step(params.blocks, row_block);
  if (step.done() && params.merge) return;
  const auto copy_step = [&](int first_key, int buffer) {
    copy_tile<kQkBytes, kStep>(k, first_key, buffers + buffer * kBuffer);
    copy_tile<kVBytes, kStep>(v, first_key, buffers + buffer * kBuffer + kTileBytes<kQkBytes, kStep>);
    cp_async_commit();
  };
  if (!step.done()) {
    copy_tile<kQkBytes, kRows>(q, first_row, q_tile);
    copy_step(step.first(), 0);
    cp_async_wait<0>();
    round_tile<kFactor, kQkBytes, kRows>(q_tile);
  }
  for (int buffer = 0; !step.done(); buffer ^= 1) {
    unsigned char* const k_tile = buffers + buffer * kBuffer;
    unsigned char* const v_tile = k_tile + kTileBytes<kQkBytes, kStep>;
    cp_async_wait<0>();
    round_tile<kFactor, kQkBytes, kStep>(k_tile);
    round_tile<kFactor, kVBytes, kStep>(v_tile);
    __syncthreads();  // this step's keys are here, and the last one's have been read
    Steps<kStep> next = step;
    next.next(params.blocks);
    if (!next.done()) copy_step(next.first(), buffer ^ 1);
    float s[kTiles][kStep / 8][4], rescale[kTiles][2];
    multiply_tiles<kFactor, kQkBytes>(s, q_tile, warp_row, k_tile);
    finish_scores<kTerms>(params, step, warp_row, first_row, s);
    exponentiate(softmax, factor, s, rescale);
    if constexpr (kTerms == Terms::kAll) drop(p, first_row + warp_row, step.first(), s);
    rescale_rows(rescale, out);
    accumulate_tiles<kFactor, kDimV>(out, s, v_tile);
    step = next;
  }
  finish_rows<kDimV>(params, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                     params.blocks.order[opaque(static_cast<int>(blockIdx.x))], first_row + warp_row, softmax, out);
}

template <Factor kFactor, int kDimQk, int kDimV, int kTiles, int kStep>
void launch_mma_forward(const AttendParams& params, cudaStream_t stream) {
  const AttendProblem& p = params.problem;
  const dim3 grid(static_cast<unsigned>(params.blocks.count), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  constexpr int kWidth = kFactorBytes<kFactor>;
  constexpr std::size_t kBytes = forward_shared_bytes<kDimQk * kWidth, kDimV * kWidth, kTiles, kStep>();
  static_assert(kBytes <= kMostSharedBytes);
  const auto start = [&](auto kernel) { launch(kernel, grid, dim3(kMmaThreads), kBytes, stream, params); };
  Terms terms = terms_in(p.terms);
  if (p.scale < 0 && terms == Terms::kNone) terms = Terms::kScores;  // maxima of products are not maxima of scores
  switch (terms) {
    case Terms::kNone: return start(&mma_forward<kFactor, kDimQk, kDimV, kTiles, kStep, Terms::kNone>);
    case Terms::kScores: return start(&mma_forward<kFactor, kDimQk, kDimV, kTiles, kStep, Terms::kScores>);
    case Terms::kAll: return start(&mma_forward<kFactor, kDimQk, kDimV, kTiles, kStep, Terms::kAll>);
  }
}

// kStep: keys of a step in halves.
template <int kDimQk, int kDimV, int kTiles, int kStep>
void launch_mma_forward(const AttendParams& params, cudaStream_t stream) {
  with_factor<kDimQk>(params.problem.storage, [&](auto factor) {
    constexpr Factor kFactor = decltype(factor)::value;
    launch_mma_forward<kFactor, kDimQk, kDimV, kTiles, kStepOf<kFactor, kStep>>(params, stream);
  });
}

}  // namespace dattn::cuda
