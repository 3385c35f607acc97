// Tensors of the caller as views, and the types of both sides.
#pragma once

#include <string_view>

#include "core/device/stream.h"
#include "core/tensor/tensor.h"
#include "plugins/c/dattn.h"

namespace dattn::c {

DType to_dtype(dattn_dtype type, std::string_view name);  // throws Error(kBadInput) for what is not computed with
Device to_device(dattn_device device, std::string_view name);

// A view of `axes` axes on the caller's memory. Throws Error(kBadInput) where the pointer is NULL, or axes, type or device are
// others than these.
TensorView view_of(const dattn_tensor* tensor, int axes, Device device, std::string_view name);
// The same where NULL stands for a tensor that is not there: a view without memory.
TensorView optional_view(const dattn_tensor* tensor, int axes, Device device, std::string_view name);
// The same for elements that are only moved: of any type of 2, 4 or 8 bytes, seen as one of that size, and any number of axes.
TensorView view_of_elements(const dattn_tensor* tensor, Device device, std::string_view name);

// Between construction and end the thread's stream runs after what the caller's stream held at first, and the caller's stream
// waits for what the thread's was given. On the cpu nothing.
class CallerStream {
 public:
  CallerStream(Device device, void* stream);
  void done() const;  // not called after a failure: results are then of no use

 private:
  Device device_;
  void* stream_;
};

}  // namespace dattn::c
