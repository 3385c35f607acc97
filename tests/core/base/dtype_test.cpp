// bf16 rounding and the names of element types.
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

TEST(DType, NamesRoundTripAndUnknownOnesAreRefused) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF64, DType::kI32}) EXPECT_EQ(dtype_from(name_of(type)), type);
  try {
    dtype_from("fp16");
    FAIL() << "fp16 was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    EXPECT_THAT(error.what(), testing::HasSubstr("unknown dtype 'fp16'; known: fp32, bf16"));
  }
}

TEST(DType, AccumulatorsAreWideAndDispatchPicksTheType) {
  EXPECT_EQ(accumulate_type(DType::kBF16), DType::kF32);
  EXPECT_EQ(accumulate_type(DType::kF32), DType::kF32);
  EXPECT_EQ(accumulate_type(DType::kF64), DType::kF64);
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF64}) {
    EXPECT_EQ(dispatch_float(type, [](auto zero) { return dtype_of<decltype(zero)>(); }), type);
    EXPECT_EQ(dispatch_float(type, [](auto zero) { return static_cast<std::int64_t>(sizeof(zero)); }), size_of(type));
  }
}

}  // namespace
}  // namespace dattn
