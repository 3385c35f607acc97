// Rounding to bf16 and fp16, and the names of element types.
#include "core/base/dtype.h"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"

namespace dattn {
namespace {

float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint16_t bf16_bits(float value) { return BFloat16(value).bits; }

TEST(BFloat16, RoundsHalfToEven) {
  EXPECT_EQ(bf16_bits(1.0f), 0x3f80);
  EXPECT_EQ(bf16_bits(from_bits(0x3f808000)), 0x3f80);  // half way, even below
  EXPECT_EQ(bf16_bits(from_bits(0x3f818000)), 0x3f82);  // half way, even above
  EXPECT_EQ(bf16_bits(from_bits(0x3f808001)), 0x3f81);  // just above half
  EXPECT_EQ(bf16_bits(from_bits(0x3f817fff)), 0x3f81);  // just below half
  EXPECT_EQ(bf16_bits(-0.0f), 0x8000);
}

TEST(BFloat16, KeepsInfinitiesAndNaN) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(bf16_bits(infinity), 0x7f80);
  EXPECT_EQ(bf16_bits(-infinity), 0xff80);
  EXPECT_EQ(bf16_bits(std::numeric_limits<float>::max()), 0x7f80);               // rounds past the largest bf16
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(from_bits(0x7f800001)))));  // payload only in the lower half
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(from_bits(0xffffffff)))));
}

RC_GTEST_PROP(BFloat16, NearestOfItsNeighbours, (std::uint32_t word)) {
  const float value = from_bits(word);
  RC_PRE(std::isfinite(value) && std::abs(value) < 1e38f);
  const double rounded = static_cast<double>(BFloat16(value));
  const double below = from_bits(word & 0xffff0000u), above = from_bits((word & 0xffff0000u) + 0x10000u);
  const double best = std::min(std::abs(below - value), std::abs(above - value));
  RC_ASSERT(std::abs(rounded - value) == best);
}

RC_GTEST_PROP(BFloat16, EveryValueSurvivesARoundTrip, (std::uint16_t bits)) {
  BFloat16 value;
  value.bits = bits;
  const float wide = static_cast<float>(value);
  RC_PRE(!std::isnan(wide));
  RC_ASSERT(BFloat16(wide).bits == bits);
}

Float16 f16_of(std::uint16_t bits) {
  Float16 value;
  value.bits = bits;
  return value;
}
std::uint16_t f16_bits(float value) { return Float16(value).bits; }

TEST(Float16, RoundsHalfToEven) {
  EXPECT_EQ(f16_bits(1.0f), 0x3c00);
  EXPECT_EQ(f16_bits(1.0f + 0x1p-11f), 0x3c00);             // half way, even below
  EXPECT_EQ(f16_bits(1.0f + 3 * 0x1p-11f), 0x3c02);         // half way, even above
  EXPECT_EQ(f16_bits(1.0f + 0x1p-11f + 0x1p-23f), 0x3c01);  // just above half
  EXPECT_EQ(f16_bits(65504.0f), 0x7bff);                    // the largest
  EXPECT_EQ(f16_bits(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(f16_bits(65520.0f), 0x7c00);      // half way to what would be next
  EXPECT_EQ(f16_bits(0x1p-14f), 0x0400);      // the smallest that is normal
  EXPECT_EQ(f16_bits(0x1.ff8p-15f), 0x03ff);  // the largest that is not
  EXPECT_EQ(f16_bits(0x1.ffcp-15f), 0x0400);  // half way between both
  EXPECT_EQ(f16_bits(0x1p-24f), 0x0001);
  EXPECT_EQ(f16_bits(0x1p-25f), 0x0000);  // half way, even below
  EXPECT_EQ(f16_bits(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(f16_bits(-0.0f), 0x8000);
}

TEST(Float16, KeepsInfinitiesAndNaN) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(f16_bits(infinity), 0x7c00);
  EXPECT_EQ(f16_bits(-infinity), 0xfc00);
  EXPECT_EQ(static_cast<float>(f16_of(0xfc00)), -infinity);
  EXPECT_TRUE(std::isnan(static_cast<float>(Float16(from_bits(0x7f800001)))));  // payload only in the lower bits
  EXPECT_TRUE(std::isnan(static_cast<float>(f16_of(0x7c01))));
}

// Of all 65,536.
TEST(Float16, EveryValueSurvivesARoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = static_cast<float>(f16_of(static_cast<std::uint16_t>(bits)));
    const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 0x3ff);
    if (exponent == 31) continue;
    const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    ASSERT_EQ(wide, static_cast<float>(bits & 0x8000 ? -size : size)) << bits;
    ASSERT_EQ(f16_bits(wide), bits);
  }
}

RC_GTEST_PROP(Float16, NearestOfItsNeighbours, (std::uint32_t word)) {
  const float value = from_bits((word & 0x87ffffffu) | 0x30000000u | (word & 0x18000000u));  // between 2^-31 and 2^33
  RC_PRE(std::abs(value) < 65504.0f);
  const std::uint16_t bits = f16_bits(value);
  const double here = std::abs(static_cast<double>(f16_of(bits)) - value);
  const double above = std::abs(static_cast<double>(f16_of(static_cast<std::uint16_t>(bits + 1))) - value);
  RC_ASSERT(here < above || (here == above && bits % 2 == 0) || (bits & 0x7fff) == 0x7bff);
  if ((bits & 0x7fff) == 0) return;
  const double below = std::abs(static_cast<double>(f16_of(static_cast<std::uint16_t>(bits - 1))) - value);
  RC_ASSERT(here < below || (here == below && bits % 2 == 0));
}

TEST(DType, NamesRoundTripAndUnknownOnesAreRefused) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI32})
    EXPECT_EQ(dtype_from(name_of(type)), type);
  try {
    dtype_from("fp8");
    FAIL() << "fp8 was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    EXPECT_THAT(error.what(), testing::HasSubstr("unknown dtype 'fp8'; known: fp32, bf16, fp16"));
  }
}

TEST(DType, AccumulatorsAreWideAndDispatchPicksTheType) {
  EXPECT_EQ(accumulate_type(DType::kBF16), DType::kF32);
  EXPECT_EQ(accumulate_type(DType::kF16), DType::kF32);
  EXPECT_EQ(accumulate_type(DType::kF32), DType::kF32);
  EXPECT_EQ(accumulate_type(DType::kF64), DType::kF64);
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    EXPECT_EQ(dispatch_float(type, [](auto zero) { return dtype_of<decltype(zero)>(); }), type);
    EXPECT_EQ(dispatch_float(type, [](auto zero) { return static_cast<std::int64_t>(sizeof(zero)); }), size_of(type));
  }
}

}  // namespace
}  // namespace dattn
