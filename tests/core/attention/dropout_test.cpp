// Dropout's numbers: the rate, no correlation between neighbours along any axis, a function of nothing but its keys.
#include "core/attention/dropout.h"

#include <gtest/gtest.h>

namespace dattn {
namespace {

AttentionDropout dropout_of(double p, std::uint64_t seed = 7, std::uint64_t stream = 3) {
  AttentionDropout dropout;
  dropout.p = p;
  dropout.seed = seed;
  dropout.stream = stream;
  dropout.heads = 4;
  return dropout;
}

constexpr std::int64_t kQueries = 256, kKeys = 512;
constexpr auto kPairs = static_cast<double>(kQueries * kKeys);

template <class Body>
double count_pairs(const Body& body) {
  std::int64_t count = 0;
  for (std::int64_t q = 0; q < kQueries; ++q) {
    for (std::int64_t k = 0; k < kKeys; ++k) count += body(q, k) ? 1 : 0;
  }
  return static_cast<double>(count);
}

TEST(AttentionDropout, KeepsTheRightShare) {
  for (const double p : {1e-6, 0.1, 0.25, 0.5, 0.9, 0.999}) {
    const AttentionDropout dropout = dropout_of(p);
    const double kept = count_pairs([&](std::int64_t q, std::int64_t k) { return keeps(dropout, 0, 1, q, k); });
    EXPECT_NEAR(kept, kPairs * (1 - p), 4.5 * std::sqrt(kPairs * p * (1 - p)) + 1) << "p = " << p;
  }
}

TEST(AttentionDropout, IsTheComparisonOfAUniformNumber) {
  const AttentionDropout dropout = dropout_of(0.3);
  for (std::int64_t k = 0; k < 100; ++k) {
    const PhiloxBlock words = philox4x32(7, {3, 2 * 4 + 1, 5, static_cast<std::uint32_t>(k / 4)});
    EXPECT_EQ(keeps(dropout, 2, 1, 5, k), static_cast<double>(uniform01(words[static_cast<std::size_t>(k % 4)])) >= 0.3);
  }
  EXPECT_EQ(drop_below(dropout_of(0.5)), 1u << 23);
  EXPECT_EQ(drop_below(dropout_of(1e-12)), 1u);
}

// Neighbours agree as often as independent numbers do.
TEST(AttentionDropout, NeighboursAreIndependent) {
  const double p = 0.3;
  const AttentionDropout a = dropout_of(p), next_stream = dropout_of(p, 7, 4), next_seed = dropout_of(p, 8, 3);
  const double equal = p * p + (1 - p) * (1 - p), error = 4.5 * std::sqrt(kPairs * equal * (1 - equal));
  const auto agreement = [&](const auto& other) {
    return count_pairs([&](std::int64_t q, std::int64_t k) { return keeps(a, 0, 1, q, k) == other(q, k); });
  };
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 0, 1, q, k + 1); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 0, 1, q, k + 4); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 0, 1, q + 1, k); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 0, 1, k, q); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 0, 2, q, k); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(a, 1, 1, q, k); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(next_stream, 0, 1, q, k); }), kPairs * equal, error);
  EXPECT_NEAR(agreement([&](auto q, auto k) { return keeps(next_seed, 0, 1, q, k); }), kPairs * equal, error);
}

// Chi-square of the 16 patterns of four keys that share a block.
TEST(AttentionDropout, PatternsOfOneBlockAreEquallyLikely) {
  const AttentionDropout dropout = dropout_of(0.5);
  double counts[16] = {};
  for (std::int64_t q = 0; q < kQueries; ++q) {
    for (std::int64_t k = 0; k < kKeys; k += 4) {
      int pattern = 0;
      for (int w = 0; w < 4; ++w) pattern |= keeps(dropout, 0, 0, q, k + w) ? 1 << w : 0;
      ++counts[pattern];
    }
  }
  double chi = 0;
  for (const double count : counts) chi += (count - kPairs / 64) * (count - kPairs / 64) / (kPairs / 64);
  EXPECT_LT(chi, 37.7);  // 15 degrees of freedom: exceeded once in a thousand draws
  EXPECT_GT(chi, 3.5);
}

TEST(AttentionDropout, BatchRowsAreNumberedGlobally) {
  AttentionDropout second = dropout_of(0.5);
  second.batch_begin = 5;
  for (std::int64_t k = 0; k < 64; ++k) EXPECT_EQ(keeps(second, 1, 2, 9, k), keeps(dropout_of(0.5), 6, 2, 9, k));
}

}  // namespace
}  // namespace dattn
