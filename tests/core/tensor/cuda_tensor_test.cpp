// Copies, sums and zeros on a CUDA device give the bits that the cpu gives, whatever strides and types.
#include <algorithm>
#include <array>
#include <cstring>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "tests/core/device/on_cuda.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

using testing::kCuda;
using testing::random_tensor;
using testing::same_part;

class CudaTensor : public testing::OnCuda {};

constexpr std::array kFloats{DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

DType pick_float() { return kFloats[static_cast<std::size_t>(pick(0, std::ssize(kFloats)))]; }

// A part of a new tensor: axes in random order in memory, rows beside it that are not touched.
struct Part {
  Tensor whole;
  TensorView view;

  Part(DType dtype, const Shape& shape, std::uint64_t seed) {
    std::array<int, kMaxAxes> order{0, 1, 2, 3, 4};
    for (int i = shape.axes - 1; i > 0; --i) {
      std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(pick(0, 2) == 0 ? i : pick(0, i + 1))]);
    }
    Shape in_memory, begin;
    in_memory.axes = shape.axes;
    for (int i = 0; i < shape.axes; ++i) {
      const int axis = order[static_cast<std::size_t>(i)];
      begin[axis] = pick(0, 3) == 0 ? pick(0, 5) : 0;
      in_memory[i] = shape[axis] + (pick(0, 3) == 0 ? begin[axis] + pick(0, 3) : begin[axis]);
    }
    whole = random_tensor(dtype, in_memory, seed);
    view = whole.view();
    for (int i = 0; i < shape.axes; ++i) {
      const auto axis = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
      view.shape.extents[axis] = shape.extents[axis];
      view.strides[axis] = whole->stride(i);
      view.data = static_cast<char*>(view.data) + begin.extents[axis] * view.strides[axis] * size_of(dtype);
    }
  }
};

Shape pick_shape() {
  Shape shape;
  shape.axes = static_cast<int>(pick(1, kMaxAxes + 1));
  for (int axis = 0; axis < shape.axes; ++axis)
    shape[axis] = std::array<std::int64_t, 6>{1, 2, 3, 4, 8, 9}[static_cast<std::size_t>(pick(0, 6))];
  if (pick(0, 8) == 0) shape[0] = 0;
  return shape;
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.ptr<char>(), b.ptr<char>(), static_cast<std::size_t>(a->bytes())) == 0;
}

TEST_F(CudaTensor, CopyAndAddAsOnTheCpu) {
  EXPECT_TRUE(rc::check([] {
    const Shape shape = pick_shape();
    const DType from_type = pick_float(), to_type = pick(0, 2) == 0 ? from_type : pick_float();
    const Part from(from_type, shape, 1), to(to_type, shape, 2);
    const Tensor from_cuda = to_device(from.whole, kCuda), to_cuda = to_device(to.whole, kCuda);
    const auto call = pick(0, 2) == 0 ? copy : add;
    {
      const DeviceScope scope(kCuda);
      call(same_part(from.view, from.whole, from_cuda), same_part(to.view, to.whole, to_cuda));
    }
    call(from.view, to.view);
    RC_ASSERT(same_bytes(to_device(to_cuda, Device{}), to.whole));
  }));
}

TEST_F(CudaTensor, ZerosAsOnTheCpu) {
  EXPECT_TRUE(rc::check([] {
    const Part part(pick_float(), pick_shape(), 1);
    const Tensor on_cuda = to_device(part.whole, kCuda);
    {
      const DeviceScope scope(kCuda);
      fill_zero(same_part(part.view, part.whole, on_cuda));
    }
    fill_zero(part.view);
    RC_ASSERT(same_bytes(to_device(on_cuda, Device{}), part.whole));
  }));
}

TEST_F(CudaTensor, IntegersAreCopied) {
  Tensor numbers(DType::kI32, {6, 5});
  for (std::int32_t i = 0; i < 30; ++i) numbers.ptr<std::int32_t>()[i] = i - 7;
  const DeviceScope scope(kCuda);
  const Tensor on_cuda = to_device(numbers, kCuda), turned(DType::kI32, {5, 6});
  copy(on_cuda->transpose(0, 1), turned);
  const Tensor back = to_device(turned->transpose(0, 1), Device{});
  EXPECT_TRUE(same_bytes(back, numbers));
}

}  // namespace
}  // namespace dattn
