// What kernels are written in: CUDA C++ as nvcc compiles it, and a launch that is a function call. The tests shadow this file
// and ptx.h by their own (tests/standins/cuda), in which blocks run on the host with a fiber for each thread, so kernels keep
// to
//   __global__ __device__ __forceinline__ __restrict__, DATTN_LAUNCH_BOUNDS(threads, blocks); threadIdx, blockIdx, blockDim,
//   gridDim; DATTN_SHARED_MEMORY(name): the block's dynamic shared memory, `unsigned char*`, 128-byte aligned (no static
//   __shared__);
//   __syncthreads(), __syncwarp(), __shfl_sync, __shfl_xor_sync, __shfl_down_sync (whole warps, all threads taking part);
//   atomicAdd(float*, float); exp2f, __expf, fmaf, fminf, fmaxf, tanhf, log2f, logf, rsqrtf, __float_as_uint, __uint_as_float;
//   and the functions of ptx.h.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "core/device/cuda/grid.h"

#define DATTN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DATTN_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]  // NOLINT(bugprone-macro-parentheses)

namespace dattn::cuda {

// Starts kernel<<<grid, block, shared_bytes, stream>>>(args..); more than 48 KiB of shared memory are asked for first.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Grid grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (!starts(grid)) return;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute", grid.file, grid.line);
  }
  const auto start = [&](Params... params) {
    void* pointers[] = {&params...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, block, pointers, shared_bytes, stream),
          "cudaLaunchKernel", grid.file, grid.line);
  };
  start(std::forward<Args>(args)...);
}

}  // namespace dattn::cuda
