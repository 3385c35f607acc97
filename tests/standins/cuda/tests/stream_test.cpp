// Streams that really are asynchronous, events, memory.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/standins/cuda/tests/support.h"

namespace dattn::cuda {
namespace {

using ::testing::HasSubstr;

class CudaStandinStream : public ::testing::Test {
 protected:
  CudaStandinStream() {
    for (cudaStream_t* stream : {&a_, &b_}) cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event_, 0);
  }
  ~CudaStandinStream() override {
    open_ = true;
    open_.notify_all();
    for (cudaStream_t stream : {a_, b_}) {
      cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
    cudaEventDestroy(event_);
    cudaSetDevice(0);
  }

  // Work on the stream that waits until the test opens the gate.
  void hold(cudaStream_t stream) {
    cudaLaunchHostFunc(
        stream, [](void* gate) { static_cast<std::atomic<bool>*>(gate)->wait(false); }, &open_);
  }
  void open() {
    open_ = true;
    open_.notify_all();
  }

  cudaStream_t a_ = nullptr, b_ = nullptr;
  cudaEvent_t event_ = nullptr;
  std::atomic<bool> open_{false};
};

__global__ void multiply_add(double* number, double factor, double term) { *number = *number * factor + term; }

TEST_F(CudaStandinStream, WorkWaitsInOrder) {
  const Array<double> number(std::vector<double>{1.0});
  hold(a_);
  for (int i = 0; i < 10; ++i) launch(multiply_add, dim3(1), dim3(1), 0, a_, number.data(), 2.0, static_cast<double>(i));
  EXPECT_EQ(cudaStreamQuery(a_), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaErrorNotReady);
  EXPECT_EQ(cudaStreamQuery(b_), cudaSuccess);
  open();
  EXPECT_EQ(cudaStreamSynchronize(a_), cudaSuccess);
  double expected = 1;
  for (int i = 0; i < 10; ++i) expected = expected * 2 + i;
  EXPECT_EQ(number.values()[0], expected);
}

TEST_F(CudaStandinStream, EventsJoinStreams) {
  const Array<double> number(std::vector<double>{1.0});
  EXPECT_EQ(cudaEventQuery(event_), cudaSuccess);  // nothing recorded
  EXPECT_EQ(cudaStreamWaitEvent(b_, event_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(b_), cudaSuccess);
  hold(a_);
  for (int round = 0; round < 20; ++round) {
    launch(multiply_add, dim3(1), dim3(1), 0, a_, number.data(), 2.0, 1.0);
    cudaEventRecord(event_, a_);
    cudaStreamWaitEvent(b_, event_);
    launch(multiply_add, dim3(1), dim3(1), 0, b_, number.data(), 0.5, -1.0);
    cudaEventRecord(event_, b_);
    cudaStreamWaitEvent(a_, event_);
  }
  EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
  open();
  EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess);
  double expected = 1;
  for (int round = 0; round < 20; ++round) expected = (expected * 2 + 1) * 0.5 - 1;
  EXPECT_EQ(number.values()[0], expected);
}

TEST_F(CudaStandinStream, MemoryStartsAndEndsAsNaN) {
  float* memory = nullptr;
  ASSERT_EQ(cudaMallocAsync(reinterpret_cast<void**>(&memory), 64, a_), cudaSuccess);
  float value = 0;
  cudaMemcpyAsync(&value, memory + 3, 4, cudaMemcpyDefault, a_);
  EXPECT_TRUE(std::isnan(value));
  cudaMemsetAsync(memory, 0, 64, a_);
  cudaMemcpyAsync(&value, memory + 3, 4, cudaMemcpyDefault, a_);
  EXPECT_EQ(value, 0.0f);
  hold(a_);
  EXPECT_EQ(cudaFreeAsync(memory, a_), cudaSuccess);
  EXPECT_EQ(memory[3], 0.0f);  // not yet
  open();
  EXPECT_EQ(cudaStreamSynchronize(a_), cudaSuccess);
  EXPECT_TRUE(kAddressSanitizer || std::isnan(memory[3]));
  EXPECT_EQ(cudaFreeAsync(memory, a_), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}

TEST_F(CudaStandinStream, WritesToFreedMemoryAreReported) {
  if (kAddressSanitizer) return;
  char* memory = nullptr;
  cudaMallocAsync(reinterpret_cast<void**>(&memory), 64, a_);
  cudaFreeAsync(memory, a_);
  cudaStreamSynchronize(a_);
  memory[5] = 1;
  void* large = nullptr;  // makes the stream give up what it kept
  cudaMallocAsync(&large, std::size_t{33} << 20, a_);
  cudaFreeAsync(large, a_);
  const cudaError_t error = cudaStreamSynchronize(a_);
  EXPECT_EQ(error, cudaErrorLaunchFailure);
  EXPECT_THAT(cudaGetErrorString(error), HasSubstr("byte 5 of 64 was written after cudaFreeAsync"));
}

TEST_F(CudaStandinStream, PageableMemoryIsReadAtOnceAndPinnedMemoryInOrder) {
  const Array<int> target(std::vector<int>{0, 0});
  auto* pinned = static_cast<int*>(nullptr);
  cudaMallocHost(reinterpret_cast<void**>(&pinned), sizeof(int));
  int pageable = *pinned = 1;
  hold(a_);
  cudaMemcpyAsync(target.data(), &pageable, sizeof(int), cudaMemcpyDefault, a_);
  cudaMemcpyAsync(target.data() + 1, pinned, sizeof(int), cudaMemcpyDefault, a_);
  pageable = *pinned = 2;
  open();
  cudaStreamSynchronize(a_);
  EXPECT_EQ(target.values(), (std::vector<int>{1, 2}));
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

TEST_F(CudaStandinStream, WrongUsesAreRefused) {
  const Array<int> array(4);
  cudaSetDevice(1);
  EXPECT_EQ(standin::start({[] {}, dim3(1), dim3(1), 0}, a_), cudaErrorInvalidResourceHandle);
  cudaEvent_t other = nullptr;
  cudaEventCreateWithFlags(&other, 0);
  EXPECT_EQ(cudaEventRecord(other, a_), cudaErrorInvalidResourceHandle);
  cudaEventDestroy(other);
  EXPECT_EQ(cudaMemsetAsync(array.data() + 2, 0, 12, a_), cudaErrorInvalidValue);
  EXPECT_THAT(cudaGetErrorString(cudaErrorInvalidValue), HasSubstr("12 bytes from byte 8 of a block of 16"));
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(CudaStandinStream, MemoryIsCountedAndLimited) {
  std::size_t before = 0, now = 0, total = 0;
  cudaMemGetInfo(&before, &total);
  void* memory = nullptr;
  ASSERT_EQ(cudaMalloc(&memory, 1 << 20), cudaSuccess);
  cudaMemGetInfo(&now, &total);
  EXPECT_EQ(before - now, std::size_t{1} << 20);
  void* more = nullptr;
  EXPECT_EQ(cudaMallocAsync(&more, now + 1, a_), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  cudaFree(memory);
  cudaDeviceSynchronize();
  cudaMemGetInfo(&now, &total);
  EXPECT_EQ(before, now);
}

}  // namespace
}  // namespace dattn::cuda
