// Shapes in messages: `ensure(ok, "a tensor {}", shape)` makes the text only where it fails, which matters to checks on the way
// of every slice and copy. Apart from tensor.h because CUDA's compiler does not take {fmt}.
#pragma once

#include <string>

#include <fmt/format.h>

#include "core/tensor/tensor.h"

template <>
struct fmt::formatter<dattn::Shape> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const dattn::Shape& shape, Context& context) const {
    return fmt::formatter<std::string>::format(shape.text(), context);
  }
};
