// Forward pass of the plain path: online softmax (Dao et al., "FlashAttention", 2022) over 64 keys at a time.
#include "core/attention/cuda/plain_text.h"

namespace dattn::cuda {
namespace {

// One block of 64 query rows of one head: S in registers, P in shared memory, O = sums in registers.
template <class T, int kChunks>
__global__ void DATTN_LAUNCH_BOUNDS(kPlainThreads, 1) plain_forward(AttendParams params) {
  using Sum = typename SumOf<T>::Type;
  DATTN_SHARED_MEMORY(shared);
  const PlainMemory<Sum> memory(shared);
  const AttendProblem& p = params.problem;
  const int row_block = params.blocks.order[blockIdx.x], h = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int kv = kv_head_of(p, h), first_row = first_row_of(params, row_block, kPlainRows), warp_row = warp * kWarpRows;
  const Operand<T> q = operand_of<T>(p.q, b, h, p.seq_q), k = operand_of<T>(p.k, b, kv, p.seq_kv),
                   v = operand_of<T>(p.v, b, kv, p.seq_kv);
  const HeadTerms<Sum> head(p, b, h);
  const Sum hidden = static_cast<Sum>(minus_infinity()), log2e = static_cast<Sum>(1.44269504088896340736);
  Sum top[kWarpRows], sum[kWarpRows], out[kWarpRows][kChunks];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    top[i] = hidden;
    sum[i] = Sum(0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) out[i][c] = Sum(0);
  }
  for (Walk walk(params.blocks, row_block); !walk.done(); walk.next(params.blocks)) {
    const int first_key = walk.block * kPlainColumns;
    Sum s[kWarpRows][2];
    multiply(memory, q, first_row, k, first_key, s);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = first_row + warp_row + i;
      Dropper dropper(dropout_row(p.terms, b, h));
      bool kept[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = lane + 32 * j, key = first_key + column;
        const bool seen = row < p.seq_q && visible(params.blocks, walk.mask(params.blocks), warp_row + i, column);
        s[i][j] = seen ? score_of(p.terms, head, s[i][j], row, key).value * log2e : hidden;
        kept[j] = !seen || p.terms.drop_below == 0 || dropper.keeps(p.terms, row, key);
      }
      const Sum seen_top = warp_maximum(s[i][0] > s[i][1] ? s[i][0] : s[i][1]);
      const Sum new_top = seen_top > top[i] ? seen_top : top[i];
      const Sum finite = new_top == hidden ? Sum(0) : new_top;  // (-inf) - (-inf) would be NaN
      const Sum rescale = power_of_2(top[i] - finite);
      const Sum p0 = power_of_2(s[i][0] - finite), p1 = power_of_2(s[i][1] - finite);
      top[i] = new_top;
      sum[i] = sum[i] * rescale + warp_sum(p0 + p1);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) out[i][c] *= rescale;
      Sum* weights = memory.weights + (warp_row + i) * kPlainColumns;
      weights[lane] = kept[0] ? p0 : Sum(0);
      weights[lane + 32] = kept[1] ? p1 : Sum(0);
    }
    accumulate<kChunks>(memory, memory.weights, v, first_key, out);
  }
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = first_row + warp_row + i;
    if (row >= p.seq_q) break;
    Sum* lse = element_of<Sum>(params.lse, b, h, row) + row_block * params.share_lse;
    const Merge<Sum> merge = merge_of(top[i], sum[i], static_cast<Sum>(p.terms.keep), params.merge, *lse);
    __syncwarp();  // all lanes have read it
    if (lane == 0) *lse = merge.lse;
    Sum* to = row_of<Sum>(params.out, b, row, h) + row_block * params.share_out;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = lane + 32 * c;
      if (d < params.out.dim) to[d] = (merge.keep == Sum(0) ? Sum(0) : merge.keep * to[d]) + merge.take * out[i][c];
    }
  }
}

}  // namespace

void plain_attend(const AttendParams& params, cudaStream_t stream) {
  const AttendProblem& p = params.problem;
  const dim3 grid(static_cast<unsigned>(params.blocks.count), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  with_storage(p.storage, [&](auto type) {
    with_chunks(p.v.dim, [&](auto chunks) {
      using T = decltype(type);
      launch(&plain_forward<T, decltype(chunks)::value>, grid, dim3(kPlainThreads),
             PlainMemory<typename SumOf<T>::Type>::bytes(1), stream, params);
    });
  });
}

}  // namespace dattn::cuda
