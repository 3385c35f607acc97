// The CUDA module's memory, streams and errors.
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/device/stream.h"
#include "tests/core/device/on_cuda.h"

namespace dattn {
namespace {

using ::testing::HasSubstr;
using testing::kCuda;

class CudaRuntime : public testing::OnCuda {};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kSystem);
    return error.what();
  }
  return "nothing was thrown";
}

TEST_F(CudaRuntime, DescribesDevices) {
  std::string why;
  const std::vector<CudaDevice> devices = cuda_devices(why);
  EXPECT_GE(devices[0].major, 8);
  EXPECT_GT(devices[0].multiprocessors, 0);
  EXPECT_GT(devices[0].memory_bytes, 0);
  EXPECT_EQ(devices[0].pci.size(), std::strlen("0000:01:00.0"));
  EXPECT_THAT(cuda_module().versions().runtime, HasSubstr("."));
}

TEST_F(CudaRuntime, OutOfMemorySaysHowMuchAndWhatToDo) {
  const DeviceScope scope(kCuda);
  set_error_context("rank 3/8");
  const std::string text = message_of([] { Tensor::uninitialized(DType::kF32, {std::int64_t{1} << 40}); });
  set_error_context("");
  EXPECT_THAT(text, HasSubstr("out of memory on cuda:0: 4398046511104 bytes were asked for"));
  EXPECT_THAT(text, HasSubstr("more ranks"));
  EXPECT_THAT(text, HasSubstr("[rank 3/8]"));
  EXPECT_EQ(message_of([] { Tensor::uninitialized(DType::kF32, {4}); }), "nothing was thrown");
}

TEST_F(CudaRuntime, ErrorsNameCallPlaceAndCudasName) {
  const std::string text = message_of([] { cuda_module().set_device(std::numeric_limits<int>::max()); });
  EXPECT_THAT(text, HasSubstr("cudaSetDevice: "));
  EXPECT_THAT(text, HasSubstr("(cudaErrorInvalidDevice) at runtime.cpp:"));
}

TEST_F(CudaRuntime, BytesMayBeReusedAtTheReturn) {
  const DeviceScope scope(kCuda);
  const NativeStream stream = current_stream().native();
  const Tensor memory(DType::kI32, {2});
  auto* const pinned = static_cast<std::int32_t*>(cuda_module().allocate_pinned(2 * sizeof(std::int32_t)));
  std::int32_t pageable[2] = {1, 2};
  cuda_module().copy_bytes(memory.ptr<void>(), pageable, sizeof pageable, stream);
  pageable[0] = 9;
  cuda_module().copy_bytes(pinned, memory.ptr<void>(), sizeof pageable, stream);
  EXPECT_EQ(pinned[0], 1);
  pinned[0] = 7;
  cuda_module().copy_bytes(memory.ptr<void>(), pinned, sizeof pageable, stream);
  pinned[0] = 8;
  cuda_module().copy_bytes(pageable, memory.ptr<void>(), sizeof pageable, stream);
  EXPECT_EQ(pageable[0], 7);
  EXPECT_EQ(pageable[1], 2);
  cuda_module().free_pinned(pinned);
}

}  // namespace
}  // namespace dattn
