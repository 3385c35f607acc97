// From the type of an activation to the C++ type, on the host and in CUDA sources.
#pragma once

#include "core/base/dtype.h"

namespace dattn {

// Calls f with a value-initialised object of the C++ type of an activation: fp32, bf16 or fp16.
template <class F>
void with_number(DType type, const F& f) {
  switch (type) {
    case DType::kBF16: return f(BFloat16{});
    case DType::kF16: return f(Float16{});
    default: return f(float{});
  }
}

}  // namespace dattn
