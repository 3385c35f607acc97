// What the threads of a block do together, and what is refused.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/standins/cuda/tests/support.h"

namespace dattn::cuda {
namespace {

using ::testing::HasSubstr;

// What the stream says of the launches so far.
std::string error_text() {
  const cudaError_t error = cudaStreamSynchronize(nullptr);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

__global__ void number_threads(int* numbers) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  numbers[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(block * 1000 + thread);
}

TEST(CudaStandinBlock, EveryThreadRunsOnceWithItsIndex) {
  Array<int> numbers(2 * 3 * 4 * 5 * 2 * 3);
  launch(number_threads, dim3(2, 3, 4), dim3(5, 2, 3), 0, nullptr, numbers.data());
  const std::vector<int> got = numbers.values();
  for (int i = 0; i < static_cast<int>(got.size()); ++i) EXPECT_EQ(got[static_cast<std::size_t>(i)], i / 30 * 1000 + i % 30);
}

constexpr unsigned kCount = 128;

template <bool kBarrier>
__global__ void reverse(int* numbers) {
  DATTN_SHARED_MEMORY(memory);
  auto* const shared = reinterpret_cast<int*>(memory);
  int* const mine = numbers + blockIdx.x * kCount;
  for (int round = 0; round < 3; ++round) {
    std::atomic_ref(shared[threadIdx.x]).store(mine[threadIdx.x], std::memory_order_relaxed);
    if (kBarrier) __syncthreads();
    mine[threadIdx.x] = std::atomic_ref(shared[kCount - 1 - threadIdx.x]).load(std::memory_order_relaxed);
    if (kBarrier) __syncthreads();
  }
}

template <bool kBarrier>
bool reverses(unsigned blocks) {
  std::vector<int> numbers(blocks * kCount);
  std::iota(numbers.begin(), numbers.end(), 0);
  Array<int> array(numbers);
  launch(reverse<kBarrier>, dim3(blocks), dim3(kCount), kCount * sizeof(int), nullptr, array.data());
  EXPECT_EQ(error_text(), "");
  const std::vector<int> got = array.values();
  for (unsigned i = 0; i < got.size(); ++i) {
    if (got[i] != static_cast<int>(i / kCount * kCount + kCount - 1 - i % kCount)) return false;
  }
  return true;
}

TEST(CudaStandinBlock, BarriersOrderSharedMemory) { EXPECT_TRUE(reverses<true>(40)); }
TEST(CudaStandinBlock, AMissingBarrierShows) { EXPECT_FALSE(reverses<false>(1)); }

__global__ void shuffle_all(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32), value = static_cast<int>(threadIdx.x) * 10;
  int* const mine = out + threadIdx.x * 4;
  mine[0] = __shfl_sync(0xffffffffu, value, 7);
  mine[1] = __shfl_xor_sync(0xffffffffu, value, 5);
  mine[2] = __shfl_down_sync(0xffffffffu, value, 3);
  mine[3] = __shfl_sync(0xffffffffu, value, lane / 4 * 4 + 1, 4);
}

TEST(CudaStandinBlock, Shuffles) {
  Array<int> out(64 * 4);
  launch(shuffle_all, dim3(1), dim3(64), 0, nullptr, out.data());
  EXPECT_EQ(error_text(), "");
  const std::vector<int> got = out.values();
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32, first = thread - lane;
    const int* mine = &got[static_cast<std::size_t>(thread) * 4];
    EXPECT_EQ(mine[0], (first + 7) * 10);
    EXPECT_EQ(mine[1], (first + (lane ^ 5)) * 10);
    EXPECT_EQ(mine[2], (first + (lane + 3 < 32 ? lane + 3 : lane)) * 10);
    EXPECT_EQ(mine[3], (first + lane / 4 * 4 + 1) * 10);
  }
}

__global__ void sum_atomically(float* sum) { atomicAdd(sum, 1.0f); }

TEST(CudaStandinBlock, AtomicSums) {
  Array<float> sum(std::vector<float>{0.0f});
  launch(sum_atomically, dim3(100), dim3(256), 0, nullptr, sum.data());
  EXPECT_EQ(sum.values()[0], 25600.0f);
}

__global__ void barrier_in_a_branch() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_for_some(int* after) {
  if (threadIdx.x < 40) __syncthreads();
  after[threadIdx.x] = 1;
}
__global__ void warp_split() {
  if (threadIdx.x < 16)
    __shfl_xor_sync(0xffffffffu, 1, 1);
  else
    __syncwarp();
}
__global__ void warp_with_a_lane_less() {
  if (threadIdx.x != 5) __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void warp_and_barrier() {
  if (threadIdx.x == 9)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void half_a_warp() { __shfl_xor_sync(0xffffffffu, 1, 1); }

TEST(CudaStandinBlock, DivergenceIsRefused) {
  launch(barrier_in_a_branch, dim3(1), dim3(64), 0, nullptr);
  EXPECT_THAT(error_text(),
              HasSubstr("block (0, 0, 0): threads wait for each other at different places: 40 from thread 0 on at "
                        "__syncthreads"));
  launch(warp_split, dim3(3), dim3(32), 0, nullptr);
  EXPECT_THAT(error_text(), HasSubstr("__syncwarp"));
  launch(warp_with_a_lane_less, dim3(1), dim3(32), 0, nullptr);
  EXPECT_THAT(error_text(), HasSubstr("(left the kernel)"));
  launch(warp_and_barrier, dim3(1), dim3(32), 0, nullptr);
  EXPECT_THAT(error_text(), HasSubstr("1 from thread 9 on at __syncthreads"));
  launch(half_a_warp, dim3(1), dim3(48), 0, nullptr);
  EXPECT_THAT(error_text(), HasSubstr("the warp has 16 threads"));
  EXPECT_TRUE(reverses<true>(4));  // later launches are not harmed
}

TEST(CudaStandinBlock, ThreadsThatHaveLeftAreNotWaitedFor) {
  Array<int> after(64);
  launch(barrier_for_some, dim3(1), dim3(64), 0, nullptr, after.data());
  EXPECT_EQ(error_text(), "");
  EXPECT_EQ(after.values(), std::vector<int>(64, 1));
}

__global__ void write_shared(int at) {
  DATTN_SHARED_MEMORY(memory);
  memory[at] = 1;
}
__global__ void read_shared(float* out) {
  DATTN_SHARED_MEMORY(memory);
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

TEST(CudaStandinBlock, SharedMemoryIsWatched) {
  Array<float> out(32);
  launch(read_shared, dim3(1), dim3(32), 128, nullptr, out.data());
  for (const float value : out.values()) EXPECT_TRUE(std::isnan(value));  // nobody wrote it
  launch(write_shared, dim3(1), dim3(1), 128, nullptr, 127);
  EXPECT_EQ(error_text(), "");
  if (kAddressSanitizer) return;
  launch(write_shared, dim3(1), dim3(1), 128, nullptr, 128);
  EXPECT_THAT(error_text(), HasSubstr("wrote beside its 128 bytes of shared memory, at byte 128"));
  launch(write_shared, dim3(1), dim3(1), 128, nullptr, -3);
  EXPECT_THAT(error_text(), HasSubstr("at byte -3"));
}

TEST(CudaStandinBlock, ImpossibleLaunchesAreRefused) {
  EXPECT_EQ(standin::start({[] {}, dim3(1), dim3(1025), 0}, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(standin::start({[] {}, dim3(1, 70000), dim3(1), 0}, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(standin::start({[] {}, dim3(1), dim3(1), 228 * 1024}, nullptr), cudaErrorInvalidValue);
  cudaGetLastError();
}

}  // namespace
}  // namespace dattn::cuda
