// What core/device/cuda/language.h says, on the host (see block.h).
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "block.h"
#include "core/device/cuda/grid.h"

#define DATTN_LAUNCH_BOUNDS(threads, blocks)
#define DATTN_SHARED_MEMORY(name) unsigned char* const name = ::dattn::cuda::standin::shared_memory()

namespace dattn::cuda {

namespace standin {

cudaError_t start(Launch launch, cudaStream_t stream);

template <class T>
struct Shuffle {
  T mine, result;
  int from;
};

template <class T>
T shuffle(const char* what, Place place, unsigned mask, T value, int from) {
  if (mask != 0xffffffffu) give_up(what, place, "mask %08x; whole warps only", mask);
  Shuffle<T> request{value, value, from};
  warp_meet(what, place, &request, [](void* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& to = *static_cast<Shuffle<T>*>(lanes[lane]);
      to.result = static_cast<Shuffle<T>*>(lanes[to.from])->mine;
    }
  });
  return request.result;
}

inline int lane() { return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp); }

}  // namespace standin

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Grid grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (!starts(grid)) return;
  const auto start = [&](Params... params) {
    check(standin::start({[=] { kernel(params...); }, grid.blocks, block, shared_bytes}, stream), "cudaLaunchKernel", grid.file,
          grid.line);
  };
  start(std::forward<Args>(args)...);
}

}  // namespace dattn::cuda

inline void __syncthreads(dattn::cuda::standin::Place place = {}) { dattn::cuda::standin::block_barrier(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, dattn::cuda::standin::Place place = {}) {
  if (mask != 0xffffffffu) dattn::cuda::standin::give_up("__syncwarp", place, "mask %08x; whole warps only", mask);
  dattn::cuda::standin::warp_meet("__syncwarp", place, nullptr, [](void* const*) {});
}

// Within groups of `width` lanes, as in CUDA: lanes outside the group are not reached.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, dattn::cuda::standin::Place place = {}) {
  const int mine = dattn::cuda::standin::lane();
  return dattn::cuda::standin::shuffle("__shfl_sync", place, mask, value, mine / width * width + (lane & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, dattn::cuda::standin::Place place = {}) {
  const int mine = dattn::cuda::standin::lane(), other = mine ^ lanes;
  return dattn::cuda::standin::shuffle("__shfl_xor_sync", place, mask, value,
                                       other < mine / width * width + width ? other : mine);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, dattn::cuda::standin::Place place = {}) {
  const int mine = dattn::cuda::standin::lane(), other = mine + static_cast<int>(lanes);
  return dattn::cuda::standin::shuffle("__shfl_down_sync", place, mask, value,
                                       other < mine / width * width + width ? other : mine);
}

inline float atomicAdd(float* address, float value) {
  return std::atomic_ref<float>(*address).fetch_add(value, std::memory_order_relaxed);
}
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
