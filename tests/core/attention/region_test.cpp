// The region algebra against brute force: every operation is compared, pair by pair, with its meaning.
#include "core/attention/region.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/attention/some_regions.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

RC_GTEST_PROP(Region, RestrictKeepsExactlyThePairsInsideAndTrims, ()) {
  const Region region = some_region();
  const Interval q = pick_interval(kSide), k = pick_interval(kSide);
  std::set<Pair> expected;
  for (const auto& [i, j] : pairs_of(region)) {
    if (i >= q.begin && i < q.end && j >= k.begin && j < k.end) expected.emplace(i, j);
  }
  const auto part = restrict_to(region, q, k);
  RC_ASSERT(part.has_value() == !expected.empty());
  RC_ASSERT(pairs_of(part) == expected);
  if (part) assert_trimmed(*part);
}

RC_GTEST_PROP(Region, IntersectIsTheCommonPairs, ()) {
  const Region a = some_region(), b = some_region();
  std::set<Pair> expected;
  for (const Pair& pair : pairs_of(a)) {
    if (b.contains(pair.first, pair.second)) expected.insert(pair);
  }
  const auto both = intersect(a, b);
  RC_ASSERT(both.has_value() == !expected.empty());
  RC_ASSERT(pairs_of(both) == expected);
  RC_ASSERT(both == intersect(b, a));
}

RC_GTEST_PROP(Region, SubtractKeepsThePairsThatTheOtherLacksOnce, ()) {
  const Region a = some_region(), b = some_region();
  std::set<Pair> expected, found;
  for (const Pair& pair : pairs_of(a)) {
    if (!b.contains(pair.first, pair.second)) expected.insert(pair);
  }
  const std::vector<Region> parts = subtract(a, b);
  RC_ASSERT(parts.size() <= 6u);
  for (const Region& part : parts) {
    assert_trimmed(part);
    for (const Pair& pair : pairs_of(part)) RC_ASSERT(found.insert(pair).second);
  }
  RC_ASSERT(found == expected);
}

RC_GTEST_PROP(Region, ShiftMovesEveryPair, ()) {
  const Region region = some_region();
  const auto dq = pick(-30, 31), dk = pick(-30, 31);
  std::set<Pair> expected;
  for (const auto& [q, k] : pairs_of(region)) expected.emplace(q + dq, k + dk);
  RC_ASSERT(pairs_of(shift(region, dq, dk)) == expected);
  RC_ASSERT(shift(shift(region, dq, dk), -dq, -dk) == region);
}

RC_GTEST_PROP(Region, AreaCountsThePairs, ()) {
  const Region region = some_region();
  RC_ASSERT(area(region) == static_cast<std::int64_t>(pairs_of(region).size()));
}

TEST(Region, AreaOfLongSequencesIsExact) {
  const std::int64_t n = 1'000'000'000;
  EXPECT_EQ(area(Region{{0, n}, {0, n}, -kUnbounded, 0}), n * (n + 1) / 2);
  EXPECT_EQ(area(Region{{0, n}, {0, n}, -127, 0}), 128 * n - 127 * 128 / 2);
  EXPECT_EQ(area(Region{{0, n}, {0, n}}), n * n);
}

TEST(Region, BoundsBeyondInfinityMeanNoBoundAndClosedOnesNothing) {
  EXPECT_EQ(area(Region{{0, 3}, {0, 3}, INT64_MIN, INT64_MAX}), 9);
  EXPECT_EQ(area(Region{{0, 3}, {0, 3}, -kUnbounded, -kUnbounded}), 0);
  EXPECT_EQ(area(Region{{0, 3}, {0, 3}, kUnbounded, kUnbounded}), 0);
  EXPECT_FALSE(restrict_to({{0, 3}, {0, 3}, -kUnbounded, -kUnbounded}, {0, 3}, {0, 3}));
  EXPECT_FALSE(restrict_to({{0, 3}, {0, 3}, kUnbounded, kUnbounded}, {0, 3}, {0, 3}));
  EXPECT_TRUE(subtract({{0, 3}, {0, 3}, -1, 1}, {{0, 3}, {0, 3}, INT64_MIN, INT64_MAX}).empty());
}

TEST(Region, Text) { EXPECT_EQ(to_text({{0, 4}, {2, 8}, -kUnbounded, 0}), "{q: [0, 4], k: [2, 8], lo: null, hi: 0}"); }

TEST(RegionList, FindsWhatAStretchOfQueriesMeets) {
  std::vector<Region> documents;
  for (std::int64_t i = 0; i < 100; ++i) documents.push_back({{10 * i, 10 * i + 10}, {10 * i, 10 * i + 10}});
  const RegionList list(documents);
  EXPECT_EQ(list.meeting({25, 40}), (Interval{2, 4}));
  EXPECT_EQ(list.meeting({0, 1}), (Interval{0, 1}));
  EXPECT_EQ(list.meeting({1000, 2000}).count(), 0);
  std::swap(documents[2], documents[50]);  // in no order all that is met is still inside
  const Interval met = RegionList(documents).meeting({25, 40});
  EXPECT_LE(met.begin, 3);
  EXPECT_GE(met.end, 51);
}

TEST(Region, SeenRangesOfManyQueriesAreJoined) {
  const std::int64_t rows = kMostSeenRanges + 1;
  const std::vector<Region> window{{{0, 8 * rows}, {0, 8 * rows}, -1, 0}}, wide{{{0, 8 * rows}, {0, 8 * rows}, -7, 0}};
  EXPECT_EQ(seen_keys(window, Positions({{3, kMostSeenRanges, 8}})).size(), static_cast<std::size_t>(kMostSeenRanges));
  EXPECT_EQ(seen_keys(window, Positions({{3, rows, 8}})), (std::vector<Interval>{{2, 8 * (rows - 1) + 4}}));
  EXPECT_EQ(seen_keys(wide, Positions({{3, rows, 8}})), (std::vector<Interval>{{0, 8 * (rows - 1) + 4}}));
}

RC_GTEST_PROP(Area, OfRunsAndARangeIsThatOfTheirPairs, ()) {
  const RegionList mask(some_disjoint_regions());
  const Positions rows = some_positions();
  const std::int64_t begin = pick(0, kSide);
  const Interval range{begin, pick(begin, kSide + 1)};
  std::int64_t as_queries = 0, as_keys = 0;
  for (const std::int64_t row : rows.list()) {
    for (std::int64_t other = range.begin; other < range.end; ++other) {
      for (const Region& region : mask) {
        as_queries += region.contains(row, other) ? 1 : 0;
        as_keys += region.contains(other, row) ? 1 : 0;
      }
    }
  }
  RC_ASSERT(area(mask, rows, range) == as_queries);
  RC_ASSERT(area(mask, range, rows) == as_keys);
}

}  // namespace
}  // namespace dattn
