// The same call on the cpu and on a CUDA device, for tests that compare the two. The tests' runs name a module
// (DATTN_CUDA_MODULE): the stand-in, or on a machine with a GPU the real one.
#pragma once

#include <cstdint>
#include <string>

#include <gtest/gtest.h>

#include "core/base/philox.h"
#include "core/device/cuda_module.h"
#include "core/tensor/tensor.h"

namespace dattn::testing {

inline constexpr Device kCuda{DeviceKind::kCuda, 0};

// Skips where no module was named.
class OnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda_devices(why).empty()) GTEST_SKIP() << why;
  }
};

inline Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t seed) {
  Tensor wide(DType::kF64, shape);
  for (std::int64_t i = 0; i < wide->elements(); ++i) {
    wide.ptr<double>()[i] = philox_normal(seed, 0, static_cast<std::uint64_t>(i));
  }
  return to_dtype(wide, dtype);
}

// `view` seen at the same place of `memory`, a copy of the tensor `whole` that it is part of.
inline TensorView same_part(const TensorView& view, const Tensor& whole, const Tensor& memory) {
  TensorView part = view;
  part.data = memory.ptr<char>() + (view.ptr<char>() - whole.ptr<char>());
  part.device = memory->device;
  return part;
}

}  // namespace dattn::testing
