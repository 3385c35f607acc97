// Devices of tensors: what there is without a CUDA module, and that memory of two devices is not mixed unseen.
#include "core/device/device.h"

#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"

namespace dattn {
namespace {

using testing::HasSubstr;

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

TEST(Device, TheCpuIsCurrentAndItsStreamIsEmpty) {
  EXPECT_EQ(current_device(), Device{});
  EXPECT_EQ(to_text(current_device()), "cpu");
  EXPECT_EQ(current_stream().native(), nullptr);
  const Event event{Device{}};
  event.record(current_stream());
  EXPECT_TRUE(event.done());
}

TEST(Device, OneThatDoesNotExistIsRefusedWithTheReason) {
  const Device none{DeviceKind::kCuda, 100};
  EXPECT_THAT(message_of([&] { const DeviceScope scope(none); }),
              testing::AllOf(HasSubstr("cuda:100"), HasSubstr("device=cpu")));
  EXPECT_EQ(current_device(), Device{});
}

TEST(Device, TensorsOfTwoDevicesAreNotCombined) {
  float memory[4] = {};
  const TensorView here(memory, DType::kF32, {4}), there(memory, DType::kF32, {4}, {DeviceKind::kCuda, 0});
  EXPECT_THAT(message_of([&] { add(here, there); }), testing::AllOf(HasSubstr("cpu"), HasSubstr("cuda:0")));
  EXPECT_EQ(there.slice(0, 1, 2).device, there.device);
  EXPECT_EQ(there.reshape({2, 2}).transpose(0, 1).device, there.device);
}

}  // namespace
}  // namespace dattn
