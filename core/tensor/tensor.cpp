#include "core/tensor/tensor.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/base/error.h"
#include "core/device/check.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "core/tensor/host_memory.h"
#include "core/tensor/shape_format.h"

namespace dattn {

// Bytes now and at most.
struct TensorCount {
  std::atomic<std::int64_t> now{0}, peak{0};

  void add(std::int64_t bytes) {
    const std::int64_t sum = now.fetch_add(bytes) + bytes;
    std::int64_t most = peak.load();
    while (sum > most && !peak.compare_exchange_weak(most, sum)) {
    }
  }
};

namespace {

TensorCount g_process;
thread_local std::shared_ptr<TensorCount> t_meter;

// Calls body(from_offset, to_offset, inner_count) for every innermost row of two equally shaped views.
template <class Body>
void for_each_row(const TensorView& a, const TensorView& b, const Body& body) {
  if (a.elements() == 0) return;
  const int last = std::max(0, a.axes() - 1);
  std::array<std::int64_t, kMaxAxes> index{};
  while (true) {
    std::int64_t from = 0, to = 0;
    for (int axis = 0; axis < last; ++axis) {
      from += index[static_cast<std::size_t>(axis)] * a.stride(axis);
      to += index[static_cast<std::size_t>(axis)] * b.stride(axis);
    }
    body(from, to);
    int axis = last - 1;
    for (; axis >= 0; --axis) {
      if (++index[static_cast<std::size_t>(axis)] < a.size(axis)) break;
      index[static_cast<std::size_t>(axis)] = 0;
    }
    if (axis < 0) return;
  }
}

template <class To, class From>
To narrow(From value) {
  if constexpr (kIsHalf<To>)
    return To(static_cast<float>(value));
  else
    return static_cast<To>(value);
}

void check_transfer(const TensorView& from, const TensorView& to, bool plain_copy) {
  ensure(from.shape == to.shape, "tensors of shapes {} and {} are combined", from.shape, to.shape);
  ensure(plain_copy || (from.dtype != DType::kI32 && to.dtype != DType::kI32),
         "integer tensors are neither added nor converted: {} to {}", name_of(from.dtype), name_of(to.dtype));
}

template <bool kAdd>
void transfer(const TensorView& from, const TensorView& to) {
  const int last = std::max(0, from.axes() - 1);
  const std::int64_t count = from.axes() == 0 ? 1 : from.size(last);
  const std::int64_t step_from = from.axes() == 0 ? 1 : from.stride(last), step_to = to.axes() == 0 ? 1 : to.stride(last);
  if (from.dtype == to.dtype && !kAdd) {
    const std::int64_t width = size_of(from.dtype);
    const bool dense = step_from == 1 && step_to == 1;  // a dense row goes in one piece
    const std::int64_t pieces = dense ? 1 : count;
    const auto bytes = static_cast<std::size_t>(dense ? count * width : width);
    for_each_row(from, to, [&](std::int64_t f, std::int64_t t) {
      for (std::int64_t i = 0; i < pieces; ++i) {
        std::memcpy(static_cast<char*>(to.data) + (t + i * step_to) * width,
                    static_cast<char*>(from.data) + (f + i * step_from) * width, bytes);
      }
    });
    return;
  }
  dispatch_float(from.dtype, [&](auto from_zero) {
    dispatch_float(to.dtype, [&](auto to_zero) {
      using From = decltype(from_zero);
      using To = decltype(to_zero);
      for_each_row(from, to, [&](std::int64_t f, std::int64_t t) {
        const From* source = from.ptr<From>() + f;
        To* target = to.ptr<To>() + t;
        for (std::int64_t i = 0; i < count; ++i) {
          const From& value = source[i * step_from];
          To& place = target[i * step_to];
          if constexpr (std::is_same_v<From, double> || std::is_same_v<To, double>) {
            place = narrow<To>(static_cast<double>(value) + (kAdd ? static_cast<double>(place) : 0.0));
          } else {
            place = narrow<To>(static_cast<float>(value) + (kAdd ? static_cast<float>(place) : 0.0f));
          }
        }
      });
    });
  });
}

void fill_zero_on_host(const TensorView& view) {
  if (view.contiguous()) {
    if (view.bytes() > 0) std::memset(view.data, 0, static_cast<std::size_t>(view.bytes()));
    return;
  }
  for (std::int64_t i = 0; i < view.size(0); ++i) {
    TensorView row = view.slice(0, i, 1);
    if (view.axes() == 1) {
      std::memset(row.data, 0, static_cast<std::size_t>(size_of(view.dtype)));
      continue;
    }
    for (int axis = 0; axis + 1 < row.axes(); ++axis) {
      row.shape[axis] = row.shape[axis + 1];
      row.strides[static_cast<std::size_t>(axis)] = row.strides[static_cast<std::size_t>(axis) + 1];
    }
    --row.shape.axes;
    fill_zero_on_host(row);
  }
}

// Bytes cross between contiguous tensors of one type; what is not is made so on its own side.
void copy_between_devices(const TensorView& from, const TensorView& to) {
  if (!from.contiguous() || from.dtype != to.dtype) return copy_between_devices(to_dtype(from, to.dtype), to);
  if (!to.contiguous()) return dattn::copy(to_device(from, to.device), to);
  const DeviceScope scope(to.device.is_cuda() ? to.device : from.device);
  cuda_module().copy_bytes(to.data, from.data, static_cast<std::size_t>(from.bytes()), current_stream().native());
  check_device(current_device());
}

}  // namespace

Shape::Shape(std::initializer_list<std::int64_t> values) : Shape(std::span(values.begin(), values.size())) {}

Shape::Shape(std::span<const std::int64_t> values) : axes(static_cast<int>(values.size())) {
  ensure(values.size() <= kMaxAxes, "a tensor has at most {} axes, got {}", kMaxAxes, values.size());
  std::copy(values.begin(), values.end(), extents.begin());
}

std::int64_t Shape::elements() const {
  std::int64_t product = 1;
  for (int axis = 0; axis < axes; ++axis) product *= (*this)[axis];
  return product;
}

bool Shape::operator==(const Shape& other) const {
  return axes == other.axes && std::equal(extents.begin(), extents.begin() + axes, other.extents.begin());
}

std::string Shape::text() const {
  std::string list;
  for (int axis = 0; axis < axes; ++axis) list += (axis ? ", " : "") + std::to_string((*this)[axis]);
  return "[" + list + "]";
}

TensorView::TensorView(void* memory, DType type, const Shape& extents, Device where)
    : data(memory), dtype(type), device(where), shape(extents) {
  std::int64_t step = 1;
  for (int axis = extents.axes - 1; axis >= 0; --axis) {
    strides[static_cast<std::size_t>(axis)] = step;
    step *= extents[axis];
  }
}

bool TensorView::contiguous() const {
  std::int64_t step = 1;
  for (int axis = axes() - 1; axis >= 0; --axis) {
    if (size(axis) != 1 && stride(axis) != step) return false;
    step *= size(axis);
  }
  return true;
}

TensorView TensorView::slice(int axis, std::int64_t begin, std::int64_t count, std::int64_t step) const {
  ensure(axis >= 0 && axis < axes() && begin >= 0 && count >= 0 && step >= 1, "slice of {} from {} by {} on axis {}", count,
         begin, step, axis);
  ensure(begin + (count == 0 ? 0 : (count - 1) * step + 1) <= size(axis), "slice of {} from {} by {} on axis {} of a tensor {}",
         count, begin, step, axis, shape);
  TensorView part = *this;
  part.data = static_cast<char*>(data) + begin * stride(axis) * size_of(dtype);
  part.shape[axis] = count;
  part.strides[static_cast<std::size_t>(axis)] *= step;
  return part;
}

TensorView TensorView::transpose(int a, int b) const {
  ensure(a >= 0 && a < axes() && b >= 0 && b < axes(), "axes {} and {} of a tensor {}", a, b, shape);
  TensorView turned = *this;
  std::swap(turned.shape[a], turned.shape[b]);
  std::swap(turned.strides[static_cast<std::size_t>(a)], turned.strides[static_cast<std::size_t>(b)]);
  return turned;
}

TensorView TensorView::reshape(const Shape& extents) const {
  ensure(contiguous() && extents.elements() == elements(), "a tensor {} cannot be seen as {}", shape, extents);
  return {data, dtype, extents, device};
}

void FreeTensor::operator()(void* memory) const {
  g_process.now -= bytes;
  if (meter) meter->now -= bytes;
  if (device.is_cuda())
    cuda_module().free(memory, stream);
  else
    free_on_host(memory, bytes);
}

Tensor Tensor::uninitialized(DType dtype, const Shape& shape) {
  const Device device = current_device();
  const FreeTensor free{device, current_stream().native(), shape.elements() * size_of(dtype), t_meter};
  void* memory = device.is_cuda()
                     ? cuda_module().allocate(static_cast<std::size_t>(std::max<std::int64_t>(free.bytes, 1)), free.stream)
                     : allocate_on_host(free.bytes);
  g_process.add(free.bytes);
  if (t_meter) t_meter->add(free.bytes);
  Tensor tensor;
  tensor.memory_ = {memory, free};
  tensor.view_ = TensorView(memory, dtype, shape, device);
  return tensor;
}

Tensor::Tensor(DType dtype, const Shape& shape) : Tensor(uninitialized(dtype, shape)) { fill_zero(view_); }

Tensor Tensor::clone() const { return to_dtype(view_, view_.dtype); }

bool on_cuda(std::initializer_list<const TensorView*> views) {
  const Device device = (*views.begin())->device;
  for (const TensorView* view : views) {
    if (view->device == device) continue;
    fail(ErrorCode::kInternal, "tensors of {} and {} are combined; to_device brings one to the other", to_text(device),
         to_text(view->device));
  }
  return device.is_cuda();
}

void fill_zero(const TensorView& view) {
  if (view.elements() == 0) return;
  if (on_cuda({&view}))
    cuda_module().fill_zero(view, current_stream().native());
  else
    fill_zero_on_host(view);
}

void copy(const TensorView& from, const TensorView& to) {
  check_transfer(from, to, from.dtype == to.dtype);
  if (from.elements() == 0) return;
  if (from.device != to.device) return copy_between_devices(from, to);
  if (on_cuda({&from, &to}))
    cuda_module().copy(from, to, current_stream().native());
  else
    transfer<false>(from, to);
}

void add(const TensorView& from, const TensorView& to) {
  check_transfer(from, to, false);
  if (from.elements() == 0) return;
  if (on_cuda({&from, &to}))
    cuda_module().add(from, to, current_stream().native());
  else
    transfer<true>(from, to);
}

void take_maximum(const TensorView& from, const TensorView& to) {
  check_transfer(from, to, false);
  ensure(from.dtype == to.dtype, "the maximum of {} and {}", name_of(from.dtype), name_of(to.dtype));
  if (from.elements() == 0) return;
  if (on_cuda({&from, &to})) return cuda_module().take_maximum(from, to, current_stream().native());
  const int last = std::max(0, from.axes() - 1);
  const std::int64_t count = from.axes() == 0 ? 1 : from.size(last);
  const std::int64_t step_from = from.axes() == 0 ? 1 : from.stride(last), step_to = to.axes() == 0 ? 1 : to.stride(last);
  dispatch_float(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row(from, to, [&](std::int64_t f, std::int64_t t) {
      for (std::int64_t i = 0; i < count; ++i) {
        const T value = from.ptr<T>()[f + i * step_from];
        T& held = to.ptr<T>()[t + i * step_to];
        const auto wide = static_cast<double>(value);
        if (wide > static_cast<double>(held) || std::isnan(wide)) held = value;
      }
    });
  });
}

Tensor to_dtype(const TensorView& view, DType dtype) {
  const DeviceScope scope(view.device);
  Tensor result = Tensor::uninitialized(dtype, view.shape);
  copy(view, result);
  return result;
}

Tensor to_device(const TensorView& view, Device device) {
  const DeviceScope scope(device);
  Tensor result = Tensor::uninitialized(view.dtype, view.shape);
  copy(view, result);
  return result;
}

std::int64_t tensor_bytes_now() { return g_process.now.load(); }
std::int64_t tensor_bytes_peak() { return g_process.peak.load(); }
void reset_tensor_bytes_peak() { g_process.peak = g_process.now.load(); }

TensorMeter::TensorMeter() : count_(std::make_shared<TensorCount>()), outer_(std::exchange(t_meter, count_)) {}
TensorMeter::~TensorMeter() { t_meter = outer_; }
std::int64_t TensorMeter::now() const { return count_->now.load(); }
std::int64_t TensorMeter::peak() const { return count_->peak.load(); }

}  // namespace dattn
