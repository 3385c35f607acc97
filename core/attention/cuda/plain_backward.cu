// Backward pass of the plain path, as two kernels, so that every sum has one owner: one owns query rows (dq and dbias), one
// key rows (dk, dv). Both recompute P = 2^(S - lse) and dS = P (dP - delta) of their pairs, dP = dO V^T.
#include "core/attention/cuda/plain_text.h"

namespace dattn::cuda {
namespace {

// What a pair gives: probability before dropout's factor, 0 where dropped; and dS behind the softcap.
template <class Sum>
struct PairGradient {
  Sum probability, ds;
};

// The final statistics of a query row: -lse in base 2, which is -inf where nothing was seen, so that P = 0; and delta.
template <class Sum>
struct RowStatistics {
  Sum minus_lse, delta;
};
template <class Sum>
__device__ __forceinline__ RowStatistics<Sum> statistics_of(const GradParams& params, int b, int h, int query) {
  const Sum none = static_cast<Sum>(minus_infinity()), lse = *element_of<const Sum>(params.lse, b, h, query);
  return {lse == none ? none : -lse * static_cast<Sum>(1.44269504088896340736),
          *element_of<const Sum>(params.delta, b, h, query)};
}

// Adds dS before the softcap to dbias on the way. The pair must be visible.
template <class Sum>
__device__ __forceinline__ PairGradient<Sum> gradient_of(const GradParams& params, const HeadTerms<Sum>& head, int b, int h,
                                                         int query, int key, Sum product, Sum dp, const RowStatistics<Sum>& row,
                                                         bool to_bias) {
  const ScoreParams& terms = params.problem.terms;
  const Score<Sum> score = score_of(terms, head, product, query, key);
  const Sum probability = power_of_2(score.value * static_cast<Sum>(1.44269504088896340736) + row.minus_lse);
  bool kept = true;
  if (terms.drop_below != 0) kept = Dropper(dropout_row(terms, b, h)).keeps(terms, query, key);
  const Sum ds = probability * ((kept ? dp * static_cast<Sum>(terms.keep) : Sum(0)) - row.delta);
  if (to_bias) {
    const Bias& dbias = params.dbias;
    static_cast<Sum*>(dbias.data)[b * dbias.batch + query * dbias.row + h * dbias.head + terms.k_positions[key]] += ds;
  }
  return {kept ? probability : Sum(0), ds * score.slope};
}

// to += factor * sums, the product rounded first, so that heads added one by one are the same in one call and in several.
template <int kChunks, class Sum>
__device__ __forceinline__ void add_sums(const Matrix& to, int b, int h, int first, int count, double factor,
                                         const Sum (&sums)[kWarpRows][kChunks]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = first + warp * kWarpRows + i;
    if (row >= count) break;
    Sum* at = row_of<Sum>(to, b, row, h);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = lane + 32 * c;
      if (d < to.dim) at[d] += multiply_rounded(static_cast<Sum>(factor), sums[i][c]);
    }
  }
}

// dq of 64 query rows, and dbias. Grid: blocks, heads and batch rows of dbias; a block goes through the heads and batch rows
// that share its part of dbias, ascending.
template <class T, int kChunks>
__global__ void DATTN_LAUNCH_BOUNDS(kPlainThreads, 1) plain_grad_queries(GradParams params) {
  using Sum = typename SumOf<T>::Type;
  DATTN_SHARED_MEMORY(shared);
  const PlainMemory<Sum> memory(shared);
  const AttendProblem& p = params.problem;
  const int row_block = params.queries.order[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = row_block * kPlainRows, warp_row = warp * kWarpRows;
  const int heads = p.heads / static_cast<int>(gridDim.y), rows = p.batch / static_cast<int>(gridDim.z);
  for (int share = 0; share < heads * rows; ++share) {
    const int h = static_cast<int>(blockIdx.y) * heads + share % heads, b = static_cast<int>(blockIdx.z) * rows + share / heads;
    const int kv = kv_head_of(p, h);
    const Operand<T> q = operand_of<T>(p.q, b, h, p.seq_q), k = operand_of<T>(p.k, b, kv, p.seq_kv);
    const Operand<T> dout = operand_of<T>(params.dout, b, h, p.seq_q), v = operand_of<T>(p.v, b, kv, p.seq_kv);
    const HeadTerms<Sum> head(p, b, h);
    Sum dq[kWarpRows][kChunks] = {};
    for (Walk walk(params.queries, row_block); !walk.done(); walk.next(params.queries)) {
      const int first_key = walk.block * kPlainColumns;
      Sum s[kWarpRows][2], dp[kWarpRows][2];
      multiply(memory, q, first_row, k, first_key, s);
      multiply(memory, dout, first_row, v, first_key, dp);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const int row = first_row + warp_row + i;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = lane + 32 * j;
          Sum ds = Sum(0);
          if (row < p.seq_q && visible(params.queries, walk.mask(params.queries), warp_row + i, column)) {
            ds = gradient_of(params, head, b, h, row, first_key + column, s[i][j], dp[i][j],
                             statistics_of<Sum>(params, b, h, row), params.dbias.data != nullptr)
                     .ds;
          }
          memory.weights[(warp_row + i) * kPlainColumns + column] = ds;
        }
      }
      if (params.dq.data != nullptr) accumulate<kChunks>(memory, memory.weights, k, first_key, dq);
    }
    if (params.dq.data != nullptr) add_sums<kChunks>(params.dq, b, h, first_row, p.seq_q, p.scale, dq);
  }
}

// dk and dv of 64 key rows. Grid: blocks, KV heads, batch rows; a block goes through the query heads of the group, ascending,
// and adds each by itself.
template <class T, int kChunks>
__global__ void DATTN_LAUNCH_BOUNDS(kPlainThreads, 1) plain_grad_keys(GradParams params) {
  using Sum = typename SumOf<T>::Type;
  DATTN_SHARED_MEMORY(shared);
  const PlainMemory<Sum> memory(shared);
  const AttendProblem& p = params.problem;
  const int row_block = params.keys.order[blockIdx.x], kv = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = row_block * kPlainRows, warp_row = warp * kWarpRows;
  const Operand<T> k = operand_of<T>(p.k, b, kv, p.seq_kv), v = operand_of<T>(p.v, b, kv, p.seq_kv);
  Sum* const p_weights = memory.weights + kPlainRows * kPlainColumns;
  const QueryHeads heads = heads_of(p, kv);
  for (int h = heads.begin; h < heads.end; ++h) {
    const Operand<T> q = operand_of<T>(p.q, b, h, p.seq_q), dout = operand_of<T>(params.dout, b, h, p.seq_q);
    const HeadTerms<Sum> head(p, b, h);
    Sum dk[kWarpRows][kChunks] = {}, dv[kWarpRows][kChunks] = {};
    for (Walk walk(params.keys, row_block); !walk.done(); walk.next(params.keys)) {
      const int first_query = walk.block * kPlainColumns;
      Sum s[kWarpRows][2], dp[kWarpRows][2];
      multiply(memory, k, first_row, q, first_query, s);
      multiply(memory, v, first_row, dout, first_query, dp);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = lane + 32 * j, query = first_query + column;
        RowStatistics<Sum> statistics{};
        if (query < p.seq_q) statistics = statistics_of<Sum>(params, b, h, query);
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          const int row = first_row + warp_row + i;
          PairGradient<Sum> pair{};
          if (row < p.seq_kv && visible(params.keys, walk.mask(params.keys), warp_row + i, column))
            pair = gradient_of(params, head, b, h, query, row, s[i][j], dp[i][j], statistics, false);
          memory.weights[(warp_row + i) * kPlainColumns + column] = pair.ds;
          p_weights[(warp_row + i) * kPlainColumns + column] = pair.probability;
        }
      }
      accumulate<kChunks>(memory, memory.weights, q, first_query, dk);
      accumulate<kChunks>(memory, p_weights, dout, first_query, dv);
    }
    add_sums<kChunks>(params.dk, b, kv, first_row, p.seq_kv, p.scale, dk);
    add_sums<kChunks>(params.dv, b, kv, first_row, p.seq_kv, p.terms.keep, dv);
  }
}

}  // namespace

void plain_attend_grad(const GradParams& params, cudaStream_t stream) {
  const AttendProblem& p = params.problem;
  const auto grid = [](int blocks, int heads, int batch) {
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads), static_cast<unsigned>(batch));
  };
  const bool shares_heads = params.dbias.data != nullptr && params.dbias.head == 0;
  const bool shares_batch = params.dbias.data != nullptr && params.dbias.batch == 0;
  with_storage(p.storage, [&](auto type) {
    with_chunks(p.q.dim > p.v.dim ? p.q.dim : p.v.dim, [&](auto chunks) {
      using T = decltype(type);
      using Memory = PlainMemory<typename SumOf<T>::Type>;
      if (params.dq.data != nullptr || params.dbias.data != nullptr) {
        launch(&plain_grad_queries<T, decltype(chunks)::value>,
               grid(params.queries.count, shares_heads ? 1 : p.heads, shares_batch ? 1 : p.batch), dim3(kPlainThreads),
               Memory::bytes(1), stream, params);
      }
      if (params.dk.data != nullptr) {
        launch(&plain_grad_keys<T, decltype(chunks)::value>, grid(params.keys.count, p.kv_heads, p.batch), dim3(kPlainThreads),
               Memory::bytes(2), stream, params);
      }
    });
  });
}

}  // namespace dattn::cuda
