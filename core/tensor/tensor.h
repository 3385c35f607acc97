// TensorView: a strided window on memory that somebody else owns. Tensor: owning, contiguous, 64-byte aligned, on the thread's
// current device (core/device/device.h). Work on a device's tensors goes in order on the thread's current stream.
// Shapes and strides are in elements. Axis order is stated where a tensor is named, e.g. q [B, S, H, D].
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "core/base/dtype.h"
#include "core/device/device.h"

namespace dattn {

inline constexpr int kMaxAxes = 5;

struct Shape {
  std::array<std::int64_t, kMaxAxes> extents{};
  int axes = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> values);
  explicit Shape(std::span<const std::int64_t> values);
  std::int64_t operator[](int axis) const { return extents[static_cast<std::size_t>(axis)]; }
  std::int64_t& operator[](int axis) { return extents[static_cast<std::size_t>(axis)]; }
  std::int64_t elements() const;
  bool operator==(const Shape& other) const;
  std::string text() const;  // "[2, 1021, 9, 64]"
};

// Trivially copyable; constness of the elements is not tracked.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Device device;  // where the memory is
  Shape shape;
  std::array<std::int64_t, kMaxAxes> strides{};

  TensorView() = default;
  TensorView(void* memory, DType type, const Shape& extents, Device where = {});  // contiguous, last axis fastest

  int axes() const { return shape.axes; }
  std::int64_t size(int axis) const { return shape[axis]; }
  std::int64_t stride(int axis) const { return strides[static_cast<std::size_t>(axis)]; }
  std::int64_t elements() const { return shape.elements(); }
  std::int64_t bytes() const { return elements() * size_of(dtype); }
  bool empty() const { return data == nullptr || elements() == 0; }
  bool contiguous() const;

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  template <class T, class... Index>  // of memory that the host reads
  T& at(Index... index) const {
    const std::array<std::int64_t, sizeof...(Index)> i{static_cast<std::int64_t>(index)...};
    std::int64_t offset = 0;
    for (std::size_t axis = 0; axis < i.size(); ++axis) offset += i[axis] * strides[axis];
    return static_cast<T*>(data)[offset];
  }

  // Rows [begin, begin + count) of one axis; shares the memory.
  TensorView slice(int axis, std::int64_t begin, std::int64_t count, std::int64_t step = 1) const;
  TensorView transpose(int a, int b) const;
  TensorView reshape(const Shape& extents) const;  // contiguous views only
};

struct TensorCount;  // of a TensorMeter, below

// Gives a Tensor's memory back.
struct FreeTensor {
  Device device;
  void* stream = nullptr;  // in whose order
  std::int64_t bytes = 0;
  std::shared_ptr<TensorCount> meter;  // what counts it beside the process, or none
  void operator()(void* memory) const;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, const Shape& shape);  // zero-filled
  static Tensor uninitialized(DType dtype, const Shape& shape);
  Tensor(Tensor&& other) noexcept : memory_(std::move(other.memory_)), view_(std::exchange(other.view_, {})) {}
  Tensor& operator=(Tensor&& other) noexcept {
    memory_ = std::move(other.memory_);
    view_ = std::exchange(other.view_, {});
    return *this;
  }

  Tensor clone() const;
  bool defined() const { return view_.data != nullptr; }
  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }  // NOLINT: a Tensor is used wherever a view is read or written
  const TensorView* operator->() const { return &view_; }
  template <class T>
  T* ptr() const {
    return view_.ptr<T>();
  }

 private:
  std::unique_ptr<void, FreeTensor> memory_;
  TensorView view_;
};

// All take views of one device, but for copy between host and device, which waits until the bytes have arrived.
void fill_zero(const TensorView& view);
void copy(const TensorView& from, const TensorView& to);          // equal shapes; converts between floating types
void add(const TensorView& from, const TensorView& to);           // to += from; equal shapes; accumulates in the type of `to`
void take_maximum(const TensorView& from, const TensorView& to);  // to = the greater, a NaN before all; equal shapes and types

Tensor to_dtype(const TensorView& view, DType dtype);     // a contiguous copy on the same device
Tensor to_device(const TensorView& view, Device device);  // a contiguous copy
bool on_cuda(
    std::initializer_list<const TensorView*> views);  // are they? Throws Error(kInternal) when they lie on several devices

// Bytes held by Tensors of this process now, on all devices, and the most since the last reset: what memory assertions read.
std::int64_t tensor_bytes_now();
std::int64_t tensor_bytes_peak();
void reset_tensor_bytes_peak();

// Counts what Tensors hold that this thread makes while the meter lives, until they are freed, on whatever thread. The
// innermost meter of a thread counts alone.
class TensorMeter {
 public:
  TensorMeter();
  ~TensorMeter();
  TensorMeter(const TensorMeter&) = delete;
  TensorMeter& operator=(const TensorMeter&) = delete;

  std::int64_t now() const;
  std::int64_t peak() const;

 private:
  std::shared_ptr<TensorCount> count_, outer_;
};

}  // namespace dattn
