// Element types. Storage is fp32, bf16 or fp64 (fp64 for references and gradient checks); accumulators are
// fp32 for fp32 and bf16 storage, fp64 for fp64 storage.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

namespace dattn {

enum class DType : std::uint8_t { kF32, kBF16, kF64, kI32 };

// Brain floating point: the upper half of an fp32. Rounds to nearest even; NaN stays NaN. constexpr: kernels use it too.
struct BFloat16 {
  std::uint16_t bits = 0;

  BFloat16() = default;
  constexpr explicit BFloat16(float value) {
    const auto word = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? static_cast<std::uint16_t>((word >> 16) | 0x40u)
                  : static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
  constexpr explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
  constexpr explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
};

constexpr std::int64_t size_of(DType type) {
  switch (type) {
    case DType::kF32: return 4;
    case DType::kBF16: return 2;
    case DType::kF64: return 8;
    case DType::kI32: return 4;
  }
  return 0;
}

constexpr DType accumulate_type(DType storage) { return storage == DType::kF64 ? DType::kF64 : DType::kF32; }

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kF32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::kBF16;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kF64;
}
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::kI32;
}

std::string_view name_of(DType type);     // "fp32", "bf16", "fp64", "int32"
DType dtype_from(std::string_view name);  // throws Error(kBadInput) with the list of names

// Calls f with a value-initialised object of the C++ type that `type` stands for (floating types only).
template <class F>
decltype(auto) dispatch_float(DType type, F&& f) {
  switch (type) {
    case DType::kBF16: return f(BFloat16{});
    case DType::kF64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace dattn
