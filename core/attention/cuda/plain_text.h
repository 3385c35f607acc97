// The plain kernels' two products, on CUDA cores, for any storage and any dim: a block of 64 rows and 64 columns, 8 warps of
// 8 rows, each lane with 2 columns of the block, or with every 32nd element of a row's sum. Operands pass through shared
// memory 32 elements of the dim at a time.
#pragma once

#include "core/attention/cuda/device_text.h"
#include "core/attention/cuda/launchers.h"

namespace dattn::cuda {

inline constexpr int kPlainThreads = 256;
inline constexpr int kPlainColumns = kBlockColumns;
inline constexpr int kWarpRows = kPlainRows / (kPlainThreads / 32);
inline constexpr int kChunk = 32;                // elements of the dim
inline constexpr int kChunkStride = kChunk + 1;  // lanes that read a column do not share banks

// Shared memory: chunks of both operands, then matrices of weights [64][64].
template <class Sum>
struct PlainMemory {
  Sum *rows, *columns, *weights;

  __device__ __forceinline__ explicit PlainMemory(unsigned char* base)
      : rows(reinterpret_cast<Sum*>(base)),
        columns(rows + kPlainRows * kChunkStride),
        weights(columns + kPlainColumns * kChunkStride) {}
  static constexpr std::size_t bytes(int n_weights) {
    return sizeof(Sum) *
           ((kPlainRows + kPlainColumns) * kChunkStride + static_cast<std::size_t>(n_weights) * kPlainRows * kPlainColumns);
  }
};

// One operand: `count` rows of `dim` elements.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;
  int count, dim;
};
template <class T>
__device__ __forceinline__ Operand<T> operand_of(const Matrix& m, int b, int h, int count) {
  return {row_of<T>(m, b, 0, h), m.row, count, m.dim};
}

// Elements [element, element + 32) of 64 rows from `first` on; zeros past the ends.
template <class T, class Sum>
__device__ __forceinline__ void stage(const Operand<T>& from, int first, int element, Sum* to) {
  for (int i = static_cast<int>(threadIdx.x); i < kPlainRows * kChunk; i += kPlainThreads) {
    const int row = i / kChunk, d = i % kChunk;
    const bool inside = first + row < from.count && element + d < from.dim;
    to[row * kChunkStride + d] = inside ? widen(from.data[(first + row) * from.stride + element + d]) : Sum(0);
  }
}

// products[i][j] = row (8 warp + i) of `rows` times row (lane + 32 j) of `columns`.
template <class T, class Sum>
__device__ __forceinline__ void multiply(const PlainMemory<Sum>& memory, const Operand<T>& rows, int first_row,
                                         const Operand<T>& columns, int first_column, Sum (&products)[kWarpRows][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) products[i][0] = products[i][1] = Sum(0);
  for (int element = 0; element < rows.dim; element += kChunk) {
    __syncthreads();
    stage(rows, first_row, element, memory.rows);
    stage(columns, first_column, element, memory.columns);
    __syncthreads();
    const Sum* row = memory.rows + warp * kWarpRows * kChunkStride;
    const Sum* column = memory.columns + lane * kChunkStride;
#pragma unroll 4
    for (int d = 0; d < kChunk; ++d) {
      const Sum x = column[d], y = column[d + 32 * kChunkStride];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const Sum w = row[i * kChunkStride + d];
        products[i][0] += w * x;
        products[i][1] += w * y;
      }
    }
  }
}

// sums[i][c], element lane + 32 c, += weights of row (8 warp + i) times the rows of `from`.
template <int kChunks, class T, class Sum>
__device__ __forceinline__ void accumulate(const PlainMemory<Sum>& memory, const Sum* weights, const Operand<T>& from,
                                           int first, Sum (&sums)[kWarpRows][kChunks]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (c * kChunk >= from.dim) break;
    __syncthreads();
    stage(from, first, c * kChunk, memory.columns);
    __syncthreads();
    const Sum* weight = weights + warp * kWarpRows * kPlainColumns;
#pragma unroll 4
    for (int column = 0; column < kPlainColumns; ++column) {
      const Sum x = memory.columns[column * kChunkStride + lane];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) sums[i][c] += weight[i * kPlainColumns + column] * x;
    }
  }
}

// Is the pair of block row `row` and block column `column` visible?
__device__ __forceinline__ bool visible(const BlockTable& blocks, int mask, int row, int column) {
  return mask < 0 || (blocks.masks[mask * kPlainRows + row] >> column & 1) != 0;
}

template <class Sum>
__device__ __forceinline__ Sum warp_maximum(Sum x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Sum other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
}
template <class Sum>
__device__ __forceinline__ Sum warp_sum(Sum x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Instances for dims up to 64, 128 and 256, as chunks of 32.
template <class F>
void with_chunks(int dim, const F& f) {
  if (dim <= 64)
    f(std::integral_constant<int, 2>{});
  else if (dim <= 128)
    f(std::integral_constant<int, 4>{});
  else
    f(std::integral_constant<int, 8>{});
}
template <class F>
void with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kBF16: return f(BFloat16{});
    case Storage::kF16: return f(Float16{});
    case Storage::kF64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace dattn::cuda
