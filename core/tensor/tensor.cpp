#include "core/tensor/tensor.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/base/error.h"

namespace dattn {
namespace {

constexpr std::size_t kAlignment = 64;

}  // namespace

// Bytes now and at most.
struct TensorMeter::Count {
  std::atomic<std::int64_t> now{0}, peak{0};

  void add(std::int64_t bytes) {
    const std::int64_t sum = now.fetch_add(bytes) + bytes;
    std::int64_t most = peak.load();
    while (sum > most && !peak.compare_exchange_weak(most, sum)) {
    }
  }
};

namespace {

TensorMeter::Count g_process;
thread_local std::shared_ptr<TensorMeter::Count> t_meter;

// What a block starts with, one alignment unit before the address handed out.
struct Header {
  std::int64_t bytes = 0;
  std::shared_ptr<TensorMeter::Count> meter;  // may be null
};
static_assert(sizeof(Header) <= kAlignment);

void* allocate(std::int64_t bytes) {
  const auto rounded = (static_cast<std::size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  void* block = std::aligned_alloc(kAlignment, rounded);
  if (block == nullptr)
    fail(ErrorCode::kSystem, "out of memory: a tensor of {} bytes; use more ranks or a smaller batch", bytes);
  new (block) Header{bytes, t_meter};
  g_process.add(bytes);
  if (t_meter) t_meter->add(bytes);
  return static_cast<char*>(block) + kAlignment;
}

// Calls body(from_offset, to_offset, inner_count) for every innermost row of two equally shaped views.
template <class Body>
void for_each_row(const TensorView& a, const TensorView& b, const Body& body) {
  ensure(a.shape == b.shape, "tensors of shapes {} and {} are combined", a.shape.text(), b.shape.text());
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
  if constexpr (std::is_same_v<To, BFloat16>)
    return BFloat16(static_cast<float>(value));
  else
    return static_cast<To>(value);
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
  ensure(from.dtype != DType::kI32 && to.dtype != DType::kI32, "integer tensors are neither added nor converted: {} to {}",
         name_of(from.dtype), name_of(to.dtype));
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

TensorView::TensorView(void* memory, DType type, const Shape& extents) : data(memory), dtype(type), shape(extents) {
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

TensorView TensorView::slice(int axis, std::int64_t begin, std::int64_t count) const {
  ensure(axis >= 0 && axis < axes() && begin >= 0 && count >= 0 && begin + count <= size(axis),
         "slice [{}, {}) of axis {} of a tensor {}", begin, begin + count, axis, shape.text());
  TensorView part = *this;
  part.data = static_cast<char*>(data) + begin * stride(axis) * size_of(dtype);
  part.shape[axis] = count;
  return part;
}

TensorView TensorView::transpose(int a, int b) const {
  ensure(a >= 0 && a < axes() && b >= 0 && b < axes(), "axes {} and {} of a tensor {}", a, b, shape.text());
  TensorView turned = *this;
  std::swap(turned.shape[a], turned.shape[b]);
  std::swap(turned.strides[static_cast<std::size_t>(a)], turned.strides[static_cast<std::size_t>(b)]);
  return turned;
}

TensorView TensorView::reshape(const Shape& extents) const {
  ensure(contiguous() && extents.elements() == elements(), "a tensor {} cannot be seen as {}", shape.text(), extents.text());
  return {data, dtype, extents};
}

void Tensor::Free::operator()(void* memory) const {
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(memory) - kAlignment);
  g_process.now -= header->bytes;
  if (header->meter) header->meter->now -= header->bytes;
  header->~Header();
  std::free(header);
}

Tensor Tensor::uninitialized(DType dtype, const Shape& shape) {
  Tensor tensor;
  tensor.memory_.reset(allocate(shape.elements() * size_of(dtype)));
  tensor.view_ = TensorView(tensor.memory_.get(), dtype, shape);
  return tensor;
}

Tensor::Tensor(DType dtype, const Shape& shape) : Tensor(uninitialized(dtype, shape)) {
  std::memset(view_.data, 0, static_cast<std::size_t>(view_.bytes()));
}

Tensor Tensor::clone() const { return to_dtype(view_, view_.dtype); }

void fill_zero(const TensorView& view) {
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
    fill_zero(row);
  }
}

void copy(const TensorView& from, const TensorView& to) { transfer<false>(from, to); }
void add(const TensorView& from, const TensorView& to) { transfer<true>(from, to); }

Tensor to_dtype(const TensorView& view, DType dtype) {
  Tensor result = Tensor::uninitialized(dtype, view.shape);
  copy(view, result);
  return result;
}

std::int64_t tensor_bytes_now() { return g_process.now.load(); }
std::int64_t tensor_bytes_peak() { return g_process.peak.load(); }
void reset_tensor_bytes_peak() { g_process.peak = g_process.now.load(); }

TensorMeter::TensorMeter() : count_(std::make_shared<Count>()), outer_(std::exchange(t_meter, count_)) {}
TensorMeter::~TensorMeter() { t_meter = outer_; }
std::int64_t TensorMeter::now() const { return count_->now.load(); }
std::int64_t TensorMeter::peak() const { return count_->peak.load(); }

}  // namespace dattn
