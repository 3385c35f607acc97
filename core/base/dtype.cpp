#include "core/base/dtype.h"

#include "core/base/error.h"

namespace dattn {

std::string_view name_of(DType type) {
  switch (type) {
    case DType::kF32: return "fp32";
    case DType::kBF16: return "bf16";
    case DType::kF16: return "fp16";
    case DType::kF64: return "fp64";
    case DType::kI32: return "int32";
  }
  return "?";
}

DType dtype_from(std::string_view name) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI32}) {
    if (name == name_of(type)) return type;
  }
  fail(ErrorCode::kBadInput, "unknown dtype '{}'; known: fp32, bf16, fp16, fp64, int32", name);
}

}  // namespace dattn
