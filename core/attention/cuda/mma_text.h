// Tensor-core building blocks for bf16 and fp16: tiles in shared memory, their fragments, products of a warp.
//
// Tiles are [rows][kDim] halves, kDim a multiple of 64. The 16-byte chunk c of row r lies at place c ^ (r % 8) of its group of
// 8, so that the 8 rows of one ldmatrix matrix lie in different banks. Fragments: core/device/cuda/ptx.h.
#pragma once

#include "core/attention/cuda/device_text.h"

namespace dattn::cuda {

inline constexpr int kMmaThreads = 128;
inline constexpr int kMmaWarps = kMmaThreads / 32;
inline constexpr int kWarpTile = 16;                         // rows of one mma
inline constexpr std::size_t kMostSharedBytes = 163 * 1024;  // of a block on compute capability 8.0; later ones have more

template <int kDim, int kRows>
inline constexpr int kTileBytes = kRows* kDim * 2;

// Where a lane's row and chunk, below 8 and 16-byte units, are within 8 or more rows from a multiple of 8 on. What comes on top
// for other rows and chunks is constant, and added or exclusive-or'ed: few addresses live in registers.
template <int kDim>
__device__ __forceinline__ int place_of(int row, int chunk) {
  static_assert(kDim % 64 == 0);
  return row * kDim * 2 + ((chunk ^ row) & 7) * 16;
}
// The same for 16 k columns further on, `row` a multiple of 8 further down.
template <int kDim>
__device__ __forceinline__ unsigned char* place_at(unsigned char* tile, int place, int row, int k) {
  return tile + (place ^ (k % 4 * 32)) + (row * kDim * 2 + k / 4 * 128);
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
    return words[(part * kStep + 32 * i) / 32] >> (2 * t);
  }
};
__device__ __forceinline__ bool bit_of(std::uint32_t bits, int fragment, int j) {
  return (bits >> (fragment % 4 * 8 + j) & 1) != 0;
}

// Rows of one head of a matrix [B, S, H, D] of halves, rows and D aligned to 16 bytes.
struct HeadRows {
  const std::uint16_t* data;
  std::int64_t stride;
  int count, dim;

  __device__ __forceinline__ HeadRows(const Matrix& m, int b, int h, int n)
      : data(row_of<const std::uint16_t>(m, b, 0, h)), stride(m.row), count(n), dim(m.dim) {}
};

// Starts the copy of kRows rows from `first` on; rows and columns past the ends become zeros. 8 threads copy 128 bytes.
template <int kDim, int kRows>
__device__ __forceinline__ void copy_tile(const HeadRows& from, int first, unsigned char* tile) {
  constexpr int kStep = kMmaThreads / 8;  // rows at once
  const int thread = opaque(static_cast<int>(threadIdx.x)), row = thread / 8, chunk = thread % 8;
  unsigned char* to = tile + place_of<kDim>(row, chunk);
  const std::uint16_t* source = from.data + (first + row) * from.stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
#pragma unroll
    for (int group = 0; group < kDim / 64; ++group) {
      const bool inside = first + row + i * kStep < from.count && chunk * 8 + group * 64 < from.dim;
      cp_async_16(to + i * kStep * kDim * 2 + group * 128, source + group * 64, inside ? 16 : 0);
    }
    source += kStep * from.stride;
  }
}

// The a fragment of rows [row, row + 16) and columns [16 k, 16 k + 16).
template <int kDim>
__device__ __forceinline__ void load_a(std::uint32_t (&a)[4], unsigned char* tile, int lane, int row, int k) {
  ldmatrix_x4(a, place_at<kDim>(tile, place_of<kDim>(lane % 16, lane / 16), row, k));
}
// The b fragments of tile^T, 16 columns of the dim 16 k.. on the summed axis: b[0..1] for rows [row, row + 8), b[2..3] for the
// next 8.
template <int kDim>
__device__ __forceinline__ void load_b_transposed(std::uint32_t (&b)[4], unsigned char* tile, int lane, int row, int k) {
  ldmatrix_x4(b, place_at<kDim>(tile, place_of<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2), row, k));
}
// The b fragments of the tile itself, rows [row, row + 16) on the summed axis: b[0..1] for columns [16 n, 16 n + 8), b[2..3]
// for the next 8.
template <int kDim>
__device__ __forceinline__ void load_b(std::uint32_t (&b)[4], unsigned char* tile, int lane, int row, int n) {
  ldmatrix_x4_trans(b, place_at<kDim>(tile, place_of<kDim>(lane % 16, lane / 16), row, n));
}

template <HalfType kHalf>
__device__ __forceinline__ void mma_both(float (&c0)[4], float (&c1)[4], const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[4]) {
  const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_half<kHalf>(c0, a, first);
  mma_half<kHalf>(c1, a, second);
}

// c [kTiles * 16 rows][8 kColumns columns] = rows of tile `a` times the transposed first 8 kColumns rows of tile `b`.
template <HalfType kHalf, int kDim, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_tiles(float (&c)[kTiles][kColumns][4], unsigned char* a, int row, unsigned char* b) {
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.0f;
  }
#pragma unroll 4  // more takes registers
  for (int k = 0; k < kDim / 16; ++k) {
    std::uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_a<kDim>(left[m], a, lane, row + m * kWarpTile, k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      std::uint32_t right[4];
      load_b_transposed<kDim>(right, b, lane, n * 8, k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) mma_both<kHalf>(c[m][n], c[m][n + 1], left[m], right);
    }
  }
}

// c [kTiles * 16 rows][kDim] += weights, rounded to halves, times the first 8 kColumns rows of tile `b`.
template <HalfType kHalf, int kDim, int kTiles, int kColumns>
__device__ __forceinline__ void accumulate_tiles(float (&c)[kTiles][kDim / 8][4], const float (&weights)[kTiles][kColumns][4],
                                                 unsigned char* b) {
  const int lane = opaque(static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int k = 0; k < kColumns / 2; ++k) {
    std::uint32_t left[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const float(&w0)[4] = weights[m][2 * k];
      const float(&w1)[4] = weights[m][2 * k + 1];
      left[m][0] = pack_halves<kHalf>(w0[0], w0[1]);
      left[m][1] = pack_halves<kHalf>(w0[2], w0[3]);
      left[m][2] = pack_halves<kHalf>(w1[0], w1[1]);
      left[m][3] = pack_halves<kHalf>(w1[2], w1[3]);
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      std::uint32_t right[4];
      load_b<kDim>(right, b, lane, k * 16, n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) mma_both<kHalf>(c[m][2 * n], c[m][2 * n + 1], left[m], right);
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
