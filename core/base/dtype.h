// Element types. Storage is fp32, bf16, fp16 or fp64 (fp64 for references and gradient checks); accumulators are
// fp64 for fp64 storage, else fp32.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace dattn {

enum class DType : std::uint8_t { kF32, kBF16, kF64, kI32, kF16 };

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

// IEEE 754 binary16: largest 65504, smallest normal 2^-14, subnormals down to 2^-24. Rounds to nearest even; NaN stays NaN.
// Without branches, so that loops over many are vectors.
struct Float16 {
  std::uint16_t bits = 0;

  Float16() = default;
  [[gnu::always_inline]] constexpr explicit Float16(float value) {
    const auto word = std::bit_cast<std::uint32_t>(value), size = word & 0x7fffffffu;
    // The exponent's bias goes from 127 to 15; what rounds past 65504 becomes infinity's pattern by itself.
    const std::uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Next to 1/2, a float has fp16's subnormals as its last places.
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
    const std::uint32_t finite = size < (113u << 23) ? subnormal : normal;
    const std::uint32_t nan = 0x7e00u | ((size >> 13) & 0x3ffu);
    const std::uint32_t rounded = size > 0x7f800000u ? nan : size >= 0x477ff000u ? 0x7c00u : finite;
    bits = static_cast<std::uint16_t>(((word >> 16) & 0x8000u) | rounded);
  }
  [[gnu::always_inline]] constexpr explicit operator float() const {
    const std::uint32_t size = bits & 0x7fffu;
    const std::uint32_t normal = (size << 13) + (112u << 23), special = (size << 13) | 0x7f800000u;
    const auto subnormal = std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(size)) * 0x1p-24f);
    const std::uint32_t wide = size < 0x400u ? subnormal : size >= 0x7c00u ? special : normal;
    return std::bit_cast<float>(((bits & 0x8000u) << 16) | wide);
  }
  constexpr explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
};

// Storage types of 16 bits, which fp64 reaches by way of fp32.
template <class T>
constexpr bool kIsHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;
constexpr bool is_half(DType type) { return type == DType::kBF16 || type == DType::kF16; }

constexpr std::int64_t size_of(DType type) {
  switch (type) {
    case DType::kF32: return 4;
    case DType::kBF16: return 2;
    case DType::kF16: return 2;
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
constexpr DType dtype_of<Float16>() {
  return DType::kF16;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kF64;
}
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::kI32;
}

std::string_view name_of(DType type);     // "fp32", "bf16", "fp16", "fp64", "int32"
DType dtype_from(std::string_view name);  // throws Error(kBadInput) with the list of names

// Calls f with a value-initialised object of the C++ type that `type` stands for (floating types only).
template <class F>
decltype(auto) dispatch_float(DType type, F&& f) {
  switch (type) {
    case DType::kBF16: return f(BFloat16{});
    case DType::kF16: return f(Float16{});
    case DType::kF64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace dattn
