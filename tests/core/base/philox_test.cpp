// Philox4x32-10 against the known-answer vectors of Random123's kat_vectors, and plain statistics of what is built on it.
#include "core/base/philox.h"

#include <cmath>
#include <set>

#include <gtest/gtest.h>

namespace dattn {
namespace {

TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32(0, {0, 0, 0, 0}), (PhiloxBlock{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(philox4x32(~std::uint64_t{0}, {~0u, ~0u, ~0u, ~0u}),
            (PhiloxBlock{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(philox4x32(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}),
            (PhiloxBlock{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, UniformEndsAtItsBounds) {
  EXPECT_EQ(uniform01(0), 0.0f);
  EXPECT_EQ(uniform01(0xffffffffu), 1.0f - 0x1p-24f);
}

TEST(Philox, IndexTakesTheWordsOfOneBlockInOrder) {
  const PhiloxBlock block = philox4x32(7, {5, 0, 3, 0});
  for (std::uint64_t word = 0; word < 4; ++word) EXPECT_EQ(philox_uniform(7, 3, 20 + word), uniform01(block[word]));
}

TEST(Philox, KeyStreamAndIndexAllMatterInAllTheirBits) {
  std::set<float> values{philox_uniform(1, 1, 4)};
  for (int bit = 2; bit < 64; ++bit) {
    values.insert(philox_uniform(1 ^ (std::uint64_t{1} << bit), 1, 4));
    values.insert(philox_uniform(1, 1 ^ (std::uint64_t{1} << bit), 4));
    values.insert(philox_uniform(1, 1, 4 ^ (std::uint64_t{1} << bit)));
  }
  EXPECT_GE(values.size(), 185u);  // of 187; a few of 2^24 values may coincide
}

TEST(Philox, UniformHasTheRightMoments) {
  constexpr int kCount = 200000;
  double sum = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const double u = philox_uniform(42, 0, static_cast<std::uint64_t>(i));
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / kCount, 0.5, 0.003);  // 4.6 standard errors
  EXPECT_NEAR(squares / kCount, 1.0 / 3.0, 0.003);
}

TEST(Philox, NormalHasTheRightMoments) {
  constexpr int kCount = 200000;
  double sum = 0, squares = 0, fourth = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = philox_normal(42, 1, static_cast<std::uint64_t>(i));
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / kCount, 0.0, 0.01);
  EXPECT_NEAR(squares / kCount, 1.0, 0.015);
  EXPECT_NEAR(fourth / kCount, 3.0, 0.12);
}

}  // namespace
}  // namespace dattn
