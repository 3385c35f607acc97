#include "plugins/c/tensor.h"

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn::c {
namespace {

TensorView with_memory(const dattn_tensor& tensor, DType type, Device device, std::string_view name) {
  require(tensor.ndim >= 1 && tensor.ndim <= kMaxAxes, "{} has {} axes; 1 to {} can be taken", name, tensor.ndim, kMaxAxes);
  require(tensor.shape != nullptr, "{}.shape is NULL", name);
  const Device where = to_device(tensor.device, name);
  TensorView view(nullptr, type, Shape(std::span(tensor.shape, static_cast<std::size_t>(tensor.ndim))), where);
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    require(view.size(axis) >= 0, "{} has a negative size, {} in axis {}", name, view.size(axis), axis);
    if (tensor.strides != nullptr) view.strides[static_cast<std::size_t>(axis)] = tensor.strides[axis];
  }
  if (view.elements() == 0) return view;
  require(tensor.data != nullptr, "{} has shape {} but its data is NULL", name, view.shape.text());
  require(where == device, "{} is on {}, but the context computes on {}", name, to_text(where), to_text(device));
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

}  // namespace

DType to_dtype(dattn_dtype type, std::string_view name) {
  const auto is = [&](int code, int bits) { return type.code == code && type.bits == bits && type.lanes <= 1; };
  if (is(DATTN_FLOAT, 32)) return DType::kF32;
  if (is(DATTN_FLOAT, 64)) return DType::kF64;
  if (is(DATTN_BFLOAT, 16)) return DType::kBF16;
  if (is(DATTN_FLOAT, 16)) return DType::kF16;
  fail(ErrorCode::kBadInput, "{} has DLPack type code {} of {} bits in {} lanes; use float 16, 32 or 64, or bfloat 16", name,
       type.code, type.bits, type.lanes);
}

Device to_device(dattn_device device, std::string_view name) {
  if (device.type == DATTN_CPU || (device.type == 0 && device.index == 0)) return {};
  require(device.type == DATTN_CUDA, "{} is on DLPack device type {}; use {} (cpu) or {} (cuda)", name, device.type, DATTN_CPU,
          DATTN_CUDA);
  require(device.index >= 0 && device.index < 128, "{} is on CUDA device {}; 0 to 127 can be taken", name, device.index);
  return {DeviceKind::kCuda, static_cast<std::int8_t>(device.index)};
}

TensorView view_of(const dattn_tensor* tensor, int axes, Device device, std::string_view name) {
  require(tensor != nullptr, "{} is NULL", name);
  require(tensor->ndim == axes, "{} has {} axes; it must have {}", name, tensor->ndim, axes);
  return with_memory(*tensor, to_dtype(tensor->dtype, name), device, name);
}

TensorView optional_view(const dattn_tensor* tensor, int axes, Device device, std::string_view name) {
  return tensor == nullptr ? TensorView{} : view_of(tensor, axes, device, name);
}

TensorView view_of_elements(const dattn_tensor* tensor, Device device, std::string_view name) {
  require(tensor != nullptr, "{} is NULL", name);
  const int bits = tensor->dtype.bits * std::max<int>(1, tensor->dtype.lanes);
  if (bits == 16) return with_memory(*tensor, DType::kBF16, device, name);
  if (bits == 32) return with_memory(*tensor, DType::kF32, device, name);
  require(bits == 64, "{} has elements of {} bits; 16, 32 and 64 can be moved", name, bits);
  return with_memory(*tensor, DType::kF64, device, name);
}

CallerStream::CallerStream(Device device, void* stream) : device_(device), stream_(stream) {
  if (!device.is_cuda()) return;
  const Event ready(device);
  ready.record(Stream::borrowed(device, stream_));
  current_stream().wait(ready);
}

void CallerStream::done() const {
  if (!device_.is_cuda()) return;
  const Event finished(device_);
  finished.record(current_stream());
  Stream::borrowed(device_, stream_).wait(finished);
}

}  // namespace dattn::c
