// Tensor-core building blocks for bf16, fp16 and TF32: tiles in shared memory, their fragments, products of a warp.
//
// Tiles are [rows][kRowBytes], kRowBytes a multiple of 128. The 16-byte chunk c of row r lies at place c ^ (r % 8) of its group
// of 8, so that the 8 rows of one ldmatrix matrix lie in different banks. Fragments: core/device/cuda/ptx.h.
#pragma once

#include <type_traits>

#include "core/attention/cuda/device_text.h"
#include "core/attention/cuda/launchers.h"

namespace dattn::cuda {

inline constexpr int kMmaThreads = 128;
inline constexpr int kMmaWarps = kMmaThreads / 32;
inline constexpr int kWarpTile = 16;                         // rows of one mma
inline constexpr std::size_t kMostSharedBytes = 163 * 1024;  // of a block on compute capability 8.0; later ones have more

template <int kRowBytes, int kRows>
inline constexpr int kTileBytes = kRows* kRowBytes;

// Columns that a step takes where it would take kStep of halves: tiles of the same bytes.
template <Factor kFactor, int kStep>
inline constexpr int kStepOf = kStep * 2 / kFactorBytes<kFactor>;

// f(factor), as a type, for the storage of a problem: fp32 as TF32, for which 256 columns have no room in shared memory.
template <int kDimQk, class F>
void with_factor(Storage storage, const F& f) {
  if (storage == Storage::kF16) return f(std::integral_constant<Factor, Factor::kF16>{});
  if constexpr (kDimQk <= kMostTf32Dim) {
    if (storage == Storage::kF32) return f(std::integral_constant<Factor, Factor::kTF32>{});
  }
  f(std::integral_constant<Factor, Factor::kBF16>{});
}

// Where a lane's row and chunk, below 8 and 16-byte units, are within 8 or more rows from a multiple of 8 on. What comes on top
// for other rows and chunks is constant, and added or exclusive-or'ed: few addresses live in registers.
template <int kRowBytes>
__device__ __forceinline__ int place_of(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0);
  return row * kRowBytes + ((chunk ^ row) & 7) * 16;
}
// The same for 32 k bytes further on, `row` a multiple of 8 further down.
template <int kRowBytes>
__device__ __forceinline__ unsigned char* place_at(unsigned char* tile, int place, int row, int k) {
  return tile + (place ^ (k % 4 * 32)) + (row * kRowBytes + k / 4 * 128);
}

// A walk in steps of kStep columns, a part of a block each.
template <int kStep>
struct Steps {
  Walk walk;
  int part;

  __device__ __forceinline__ Steps(const BlockTable& blocks, int row_block) : walk(blocks, row_block), part(0) {}
  __device__ __forceinline__ bool done() const { return walk.done(); }
  __device__ __forceinline__ int first() const { return walk.block * kBlockColumns + part * kStep; }
  __device__ __forceinline__ void next(const BlockTable& blocks) {
    if (++part < kBlockColumns / kStep) return;
    part = 0;
    walk.next(blocks);
  }
  // What row `row` of the block sees of columns [32 i, 32 i + 32) of the step, shifted to a lane's: bits 0, 1, 8, 9, .. are
  // those of its columns in fragments 4 i ..
  __device__ __forceinline__ std::uint32_t bits(const BlockTable& blocks, int block_rows, int row, int i) const {
    const int mask = walk.mask(blocks), t = static_cast<int>(threadIdx.x) % 4;
    if (mask < 0) return ~0u;
    const auto* words = reinterpret_cast<const std::uint32_t*>(blocks.masks + mask * block_rows + row);
    return words[(part * kStep + 32 * i) / 32] >> (part * kStep % 32 + 2 * t);
  }
};
__device__ __forceinline__ bool bit_of(std::uint32_t bits, int fragment, int j) {
  return (bits >> (fragment % 4 * 8 + j) & 1) != 0;
}

// Rows of one head of a matrix [B, S, H, D], rows and D aligned to 16 bytes.
template <Factor kFactor>
struct HeadRows {
  using Word = std::conditional_t<kFactor == Factor::kTF32, std::uint32_t, std::uint16_t>;
  const Word* data;
  std::int64_t stride;
  int count, dim;

  __device__ __forceinline__ HeadRows(const Matrix& m, int b, int h, int n)
      : data(row_of<const Word>(m, b, 0, h)), stride(m.row), count(n), dim(m.dim) {}
};

inline constexpr int kCopiedRows = kMmaThreads / 8;  // at once: 8 threads copy 128 bytes

// Starts the copy of kRows rows from `first` on; rows and columns past the ends become zeros.
template <int kRowBytes, int kRows, Factor kFactor>
__device__ __forceinline__ void copy_tile(const HeadRows<kFactor>& from, int first, unsigned char* tile) {
  static_assert(kRows % kCopiedRows == 0);
  constexpr int kChunk = 16 / kFactorBytes<kFactor>;
  const int thread = opaque(static_cast<int>(threadIdx.x)), row = thread / 8, chunk = thread % 8;
  unsigned char* to = tile + place_of<kRowBytes>(row, chunk);
  const auto* source = from.data + (first + row) * from.stride + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kCopiedRows; ++i) {
#pragma unroll
    for (int group = 0; group < kRowBytes / 128; ++group) {
      const bool inside = first + row + i * kCopiedRows < from.count && (chunk + group * 8) * kChunk < from.dim;
      cp_async_16(to + i * kCopiedRows * kRowBytes + group * 128, source + group * 8 * kChunk, inside ? 16 : 0);
    }
    source += kCopiedRows * from.stride;
  }
}

// Rounds what the thread has copied, and waited for, to the numbers that are multiplied: once, not in each warp that reads it.
template <Factor kFactor, int kRowBytes, int kRows>
__device__ __forceinline__ void round_tile(unsigned char* tile) {
  if constexpr (kFactor == Factor::kTF32) {
    struct alignas(16) Chunk {
      float numbers[4];
    };
    const int thread = opaque(static_cast<int>(threadIdx.x));
    unsigned char* at = tile + place_of<kRowBytes>(thread / 8, thread % 8);
#pragma unroll
    for (int i = 0; i < kRows / kCopiedRows * (kRowBytes / 128); ++i) {
      auto* const place =
          reinterpret_cast<Chunk*>(at + i / (kRowBytes / 128) * kCopiedRows * kRowBytes + i % (kRowBytes / 128) * 128);
      Chunk chunk = *place;
#pragma unroll
      for (float& x : chunk.numbers) x = __uint_as_float(round_tf32(x));
      *place = chunk;
    }
  }
}

// The a fragment of rows [row, row + 16) and bytes [32 k, 32 k + 32) of them.
template <int kRowBytes>
__device__ __forceinline__ void load_a(std::uint32_t (&a)[4], unsigned char* tile, int lane, int row, int k) {
  ldmatrix_x4(a, place_at<kRowBytes>(tile, place_of<kRowBytes>(lane % 16, lane / 16), row, k));
}
// The b fragments of tile^T, 32 bytes of the dim from 32 k on on the summed axis: b[0..1] for rows [row, row + 8), b[2..3] for
// the next 8.
template <int kRowBytes>
__device__ __forceinline__ void load_b_transposed(std::uint32_t (&b)[4], unsigned char* tile, int lane, int row, int k) {
  ldmatrix_x4(b, place_at<kRowBytes>(tile, place_of<kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2), row, k));
}

// The summed axis of an mma.
template <Factor kFactor>
inline constexpr int kDepth = 32 / kFactorBytes<kFactor>;

// The b fragments of the tile itself, rows [row, row + kDepth) on the summed axis: b[0..1] for columns [16 n, 16 n + 8),
// b[2..3] for the next 8. TF32, which ldmatrix does not transpose: rows 2 t and 2 t + 1 stand for t and t + 4, as columns do in
// left_of; the 32 lanes read different banks.
template <Factor kFactor, int kRowBytes>
__device__ __forceinline__ void load_b(std::uint32_t (&b)[4], unsigned char* tile, int lane, int row, int n) {
  if constexpr (kFactor == Factor::kTF32) {
    const int place = place_of<kRowBytes>(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int next_row = i % 2, next_columns = i / 2;
      b[i] = *reinterpret_cast<const std::uint32_t*>(tile + (place ^ (n % 2 * 64 + next_columns * 32 + next_row * 16)) +
                                                     ((row + next_row) * kRowBytes + n / 2 * 128));
    }
  } else {
    ldmatrix_x4_trans(b, place_at<kRowBytes>(tile, place_of<kRowBytes>(lane % 16, lane / 16), row, n));
  }
}
// The a fragment of columns [kDepth k, kDepth (k + 1)) of weights, rounded to the numbers that are multiplied.
template <Factor kFactor, int kColumns>
__device__ __forceinline__ void left_of(std::uint32_t (&a)[4], const float (&weights)[kColumns][4], int k) {
  if constexpr (kFactor == Factor::kTF32) {
    const float(&w)[4] = weights[k];
    a[0] = round_tf32(w[0]);
    a[1] = round_tf32(w[2]);
    a[2] = round_tf32(w[1]);
    a[3] = round_tf32(w[3]);
  } else {
    const float(&w0)[4] = weights[2 * k];
    const float(&w1)[4] = weights[2 * k + 1];
    a[0] = pack_halves<kFactor>(w0[0], w0[1]);
    a[1] = pack_halves<kFactor>(w0[2], w0[3]);
    a[2] = pack_halves<kFactor>(w1[0], w1[1]);
    a[3] = pack_halves<kFactor>(w1[2], w1[3]);
  }
}

template <Factor kFactor>
__device__ __forceinline__ void mma_both(float (&c0)[4], float (&c1)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[4]) {
  const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma<kFactor>(c0, a, first);
  mma<kFactor>(c1, a, second);
}

// c [kTiles * 16 rows][8 kColumns columns] = rows of tile `a` times the transposed first 8 kColumns rows of tile `b`.
template <Factor kFactor, int kRowBytes, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_tiles(float (&c)[kTiles][kColumns][4], unsigned char* a, int row, unsigned char* b) {
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.0f;
  }
#pragma unroll 4  // more takes registers
  for (int k = 0; k < kRowBytes / 32; ++k) {
    std::uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_a<kRowBytes>(left[m], a, lane, row + m * kWarpTile, k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      std::uint32_t right[4];
      load_b_transposed<kRowBytes>(right, b, lane, n * 8, k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) mma_both<kFactor>(c[m][n], c[m][n + 1], left[m], right);
    }
  }
}

// c [kTiles * 16 rows][kDim] += weights, rounded, times the first 8 kColumns rows of tile `b`.
template <Factor kFactor, int kDim, int kTiles, int kColumns>
__device__ __forceinline__ void accumulate_tiles(float (&c)[kTiles][kDim / 8][4], const float (&weights)[kTiles][kColumns][4],
                                                 unsigned char* b) {
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int k = 0; k < kColumns * 8 / kDepth<kFactor>; ++k) {
    std::uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) left_of<kFactor>(left[m], weights[m], k);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      std::uint32_t right[4];
      load_b<kFactor, kDim * kFactorBytes<kFactor>>(right, b, lane, k * kDepth<kFactor>, n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) mma_both<kFactor>(c[m][2 * n], c[m][2 * n + 1], left[m], right);
    }
  }
}

// Sum and maximum over the four lanes that hold a row of a fragment.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace dattn::cuda
