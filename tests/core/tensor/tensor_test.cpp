// Views, strided copies and sums against plain loops; memory accounting.
#include "core/tensor/tensor.h"

#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

// Small integers: exact in every floating type, sums of two as well.
void fill(const TensorView& contiguous, int seed) {
  for (std::int64_t i = 0; i < contiguous.elements(); ++i) {
    const int value = static_cast<int>((i * 7 + seed) % 61);
    dispatch_float(contiguous.dtype, [&](auto zero) {
      using T = decltype(zero);
      contiguous.ptr<T>()[i] = T(static_cast<float>(value));
    });
  }
}

std::vector<double> values_of(const TensorView& view) {
  std::vector<double> values;
  std::array<std::int64_t, kMaxAxes> index{};
  for (std::int64_t n = 0; n < view.elements(); ++n) {
    std::int64_t rest = n, offset = 0;
    for (int axis = view.axes() - 1; axis >= 0; --axis) {
      index[static_cast<std::size_t>(axis)] = rest % view.size(axis);
      rest /= view.size(axis);
      offset += index[static_cast<std::size_t>(axis)] * view.stride(axis);
    }
    values.push_back(
        dispatch_float(view.dtype, [&](auto zero) { return static_cast<double>(view.ptr<decltype(zero)>()[offset]); }));
  }
  return values;
}

// A view of the given shape on a larger tensor: its axes in another memory order, sliced out of the middle.
struct Strided {
  Tensor memory;
  TensorView view;
};

Strided some_strided(DType dtype, const Shape& shape, int seed) {
  std::vector<int> order;  // memory order of the axes
  for (int axis = 0; axis < shape.axes; ++axis) order.push_back(axis);
  for (int i = shape.axes - 1; i > 0; --i)
    std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(pick(0, i + 1))]);
  Strided strided;
  Shape outer = shape;
  std::array<std::int64_t, kMaxAxes> begin{};
  for (int i = 0; i < shape.axes; ++i) {
    begin[static_cast<std::size_t>(i)] = pick(0, 3);
    outer[i] = shape[order[static_cast<std::size_t>(i)]] + begin[static_cast<std::size_t>(i)] + pick(0, 2);
  }
  strided.memory = Tensor(dtype, outer);
  fill(strided.memory, seed);
  TensorView memory = strided.memory;
  for (int i = 0; i < shape.axes; ++i)
    memory = memory.slice(i, begin[static_cast<std::size_t>(i)], shape[order[static_cast<std::size_t>(i)]]);
  strided.view = memory;
  for (int i = 0; i < shape.axes; ++i) {
    const auto axis = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
    strided.view.shape.extents[axis] = memory.shape[i];
    strided.view.strides[axis] = memory.stride(i);
  }
  return strided;
}

Shape some_shape() {
  Shape shape;
  shape.axes = static_cast<int>(pick(0, kMaxAxes + 1));
  for (int axis = 0; axis < shape.axes; ++axis)
    shape[axis] = *rc::gen::weightedElement<std::int64_t>({{1, 0}, {4, 1}, {8, 2}, {8, 3}});
  return shape;
}

DType some_dtype() { return *rc::gen::element(DType::kF32, DType::kBF16, DType::kF16, DType::kF64); }

double sum_of(const TensorView& view) {
  double sum = 0;
  for (const double value : values_of(view)) sum += value;
  return sum;
}

RC_GTEST_PROP(Tensor, CopyTakesEveryElementAndTouchesNothingElse, ()) {
  const Shape shape = some_shape();
  const Strided from = some_strided(some_dtype(), shape, 1), to = some_strided(some_dtype(), shape, 2);
  const auto expected = values_of(from.view);
  const double outside = sum_of(to.memory) - sum_of(to.view);
  copy(from.view, to.view);
  RC_ASSERT(values_of(to.view) == expected);
  RC_ASSERT(sum_of(to.memory) - sum_of(to.view) == outside);
}

RC_GTEST_PROP(Tensor, AddSumsEveryElementAndTouchesNothingElse, ()) {
  const Shape shape = some_shape();
  const Strided from = some_strided(some_dtype(), shape, 1), to = some_strided(some_dtype(), shape, 2);
  auto expected = values_of(to.view);
  const auto more = values_of(from.view);
  for (std::size_t i = 0; i < more.size(); ++i) expected[i] += more[i];
  const double outside = sum_of(to.memory) - sum_of(to.view);
  add(from.view, to.view);
  RC_ASSERT(values_of(to.view) == expected);
  RC_ASSERT(sum_of(to.memory) - sum_of(to.view) == outside);
}

RC_GTEST_PROP(Tensor, FillZeroClearsTheViewOnly, ()) {
  const Strided to = some_strided(some_dtype(), some_shape(), 3);
  const double outside = sum_of(to.memory) - sum_of(to.view);
  fill_zero(to.view);
  RC_ASSERT(sum_of(to.view) == 0.0);
  RC_ASSERT(sum_of(to.memory) == outside);
}

RC_GTEST_PROP(Tensor, ToDtypeIsAContiguousCopy, ()) {
  const Strided from = some_strided(some_dtype(), some_shape(), 4);
  const Tensor result = to_dtype(from.view, some_dtype());
  RC_ASSERT(result->contiguous());
  RC_ASSERT(values_of(result) == values_of(from.view));
}

TEST(Tensor, IntegersAreCopiedWithStridesToo) {
  Tensor from(DType::kI32, {2, 3});
  for (int i = 0; i < 6; ++i) from.ptr<std::int32_t>()[i] = 0x7f800001 + i;  // NaNs, were they floats
  Tensor to(DType::kI32, {3, 2});
  copy(from->transpose(0, 1), to);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) EXPECT_EQ(to->at<std::int32_t>(j, i), 0x7f800001 + i * 3 + j);
  }
  EXPECT_THROW(copy(from, Tensor(DType::kF32, {2, 3})), Error);
}

TEST(Tensor, AtSliceTransposeAndReshapeSeeTheSameMemory) {
  Tensor tensor(DType::kF32, {2, 3, 4});
  fill(tensor, 0);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.ptr<float>()) % 64, 0u);
  const float value = tensor->at<float>(1, 2, 3);
  EXPECT_EQ(tensor->slice(1, 1, 2).at<float>(1, 1, 3), value);
  EXPECT_EQ(tensor->transpose(0, 2).at<float>(3, 2, 1), value);
  EXPECT_EQ(tensor->reshape({6, 4}).at<float>(5, 3), value);
  EXPECT_FALSE(tensor->transpose(0, 2).contiguous());
  EXPECT_EQ(tensor->shape.text(), "[2, 3, 4]");
}

TEST(Tensor, WrongShapesAreRefused) {
  const Tensor tensor(DType::kF32, {2, 3});
  EXPECT_THROW(tensor->slice(1, 2, 2), Error);
  EXPECT_THROW(tensor->slice(2, 0, 1), Error);
  EXPECT_THROW(tensor->slice(0, -1, 1), Error);
  EXPECT_THROW(tensor->transpose(0, 2), Error);
  EXPECT_THROW(tensor->reshape({5}), Error);
  EXPECT_THROW(tensor->transpose(0, 1).reshape({6}), Error);
  EXPECT_THROW(copy(tensor, Tensor(DType::kF32, {3, 2})), Error);
  EXPECT_THROW((Shape{1, 2, 3, 4, 5, 6}), Error);
}

TEST(Tensor, AMovedFromTensorIsUndefined) {
  Tensor first(DType::kF32, {4});
  Tensor second = std::move(first);
  EXPECT_FALSE(first.defined());  // NOLINT: the state after a move is what is tested
  EXPECT_TRUE(second.defined());
  first = std::move(second);
  EXPECT_TRUE(first.defined());
  EXPECT_FALSE(second.defined());  // NOLINT
}

TEST(Tensor, AMeterCountsWhatItsThreadMakes) {
  Tensor later;
  const TensorMeter meter;
  {
    const Tensor a(DType::kF32, {100});
    later = Tensor(DType::kF32, {50});
    std::thread([] { const Tensor elsewhere(DType::kF32, {1000}); }).join();
    EXPECT_EQ(meter.now(), 600);
  }
  EXPECT_EQ(meter.now(), 200);
  {
    const TensorMeter inner;
    const Tensor b(DType::kF32, {10});
    std::thread([freed = std::move(later)] {}).join();
    EXPECT_EQ(inner.peak(), 40);
  }
  EXPECT_EQ(meter.now(), 0);
  EXPECT_EQ(meter.peak(), 600);
}

TEST(Tensor, BytesHeldAreCounted) {
  const std::int64_t before = tensor_bytes_now();
  reset_tensor_bytes_peak();
  {
    const Tensor a(DType::kF64, {10, 10});
    const Tensor b = a.clone();
    EXPECT_EQ(tensor_bytes_now(), before + 1600);
  }
  EXPECT_EQ(tensor_bytes_now(), before);
  EXPECT_EQ(tensor_bytes_peak(), before + 1600);
}

}  // namespace
}  // namespace dattn
