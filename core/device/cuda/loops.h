// Loops over elements and over rows, as kernels. A body is a struct with a __device__ call operator.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/device/cuda/language.h"
#include "core/device/cuda/runtime.h"

namespace dattn::cuda {

constexpr int kLoopThreads = 256;
constexpr std::int64_t kMostBlocks = 4096;  // a thread takes several elements of longer loops
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class Body>
__global__ void element_loop(std::int64_t count, Body body) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) body(i);
}

// body(i) for every i of [0, count), in any order.
template <class Body>
void for_each(std::int64_t count, NativeStream stream, const Body& body) {
  const std::int64_t blocks = std::min((count + kLoopThreads - 1) / kLoopThreads, kMostBlocks);
  launch(element_loop<Body>, dim3(static_cast<unsigned>(blocks)), dim3(kLoopThreads), 0, static_cast<cudaStream_t>(stream),
         count, body);
}

template <class Body>
__global__ void row_loop(std::int64_t rows, Body body) {
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * warps;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * warps + warp; row < rows; row += step) {
    body(row, static_cast<int>(threadIdx.x) % 32);
  }
}

// body(row, lane) for every row of [0, rows) by the 32 lanes of a warp, which may shuffle.
template <class Body>
void for_each_row(std::int64_t rows, NativeStream stream, const Body& body) {
  constexpr int kWarps = 4;
  const std::int64_t blocks = std::min((rows + kWarps - 1) / kWarps, kMostBlocks);
  launch(row_loop<Body>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps), 0, static_cast<cudaStream_t>(stream), rows,
         body);
}

// Over the lanes of a warp, in a fixed order; every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}

}  // namespace dattn::cuda
