// The region algebra against brute force: every operation is compared, pair by pair, with its meaning.
#include "core/attention/region.h"

#include <set>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

using Pair = std::pair<std::int64_t, std::int64_t>;
constexpr std::int64_t kSide = 14;  // brute force looks at positions [0, kSide)

std::int64_t some_bound() { return pick(0, 4) > 0 ? pick(-kSide - 2, kSide + 3) : *rc::gen::element(-kUnbounded, kUnbounded); }

Region some_region() { return {pick_interval(kSide), pick_interval(kSide), some_bound(), some_bound()}; }

std::set<Pair> pairs_of(const Region& region) {
  std::set<Pair> pairs;
  for (std::int64_t q = region.q.begin; q < region.q.end; ++q) {
    for (std::int64_t k = region.k.begin; k < region.k.end; ++k) {
      if (region.contains(q, k)) pairs.emplace(q, k);
    }
  }
  return pairs;
}

std::set<Pair> pairs_of(const std::optional<Region>& region) { return region ? pairs_of(*region) : std::set<Pair>{}; }

// Every row and column holds a pair, and a bound that is kept cuts something off.
void assert_trimmed(const Region& region) {
  std::set<std::int64_t> rows, columns;
  for (const auto& [q, k] : pairs_of(region)) {
    rows.insert(q);
    columns.insert(k);
  }
  RC_ASSERT(static_cast<std::int64_t>(rows.size()) == region.q.count());
  RC_ASSERT(static_cast<std::int64_t>(columns.size()) == region.k.count());
  RC_ASSERT(region.lo == -kUnbounded || region.lo > region.k.begin - (region.q.end - 1));
  RC_ASSERT(region.hi == kUnbounded || region.hi < region.k.end - 1 - region.q.begin);
}

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

TEST(Tiles, TooManySingleRowsAreRefused) {
  const std::int64_t rows = 3 * kMostSingleRows;
  EXPECT_TRUE(has_narrow_windows({{{0, 1}, RegionList({{{0, 9}, {0, 9}, -1, 0}})}}, 3));
  EXPECT_FALSE(has_narrow_windows({{{0, 1}, RegionList({{{0, 9}, {0, 9}, -1, 0}, {{0, 9}, {0, 2}}})}}, 2));
  const std::vector<Region> all{{{0, rows}, {0, rows}}};
  EXPECT_THROW(make_tiles(all, Positions::range(0, rows), Positions({{0, 10, 7}})), Error);
  const std::vector<Region> window{{{0, 8 * rows}, {0, 8 * rows}, -1, 0}};
  EXPECT_THROW(seen_keys(window, Positions({{0, rows, 8}})), Error);
  const std::vector<Region> few{{{0, 70}, {0, rows}}};
  EXPECT_EQ(make_tiles(few, Positions::range(0, rows), Positions({{0, 10, 7}})).size(), 70u);
}

// ---- tiles ----

// Distinct positions in [0, kSide), as runs of any steps, in any order of runs.
Positions some_positions() {
  std::vector<std::int64_t> free(kSide);
  for (std::int64_t i = 0; i < kSide; ++i) free[static_cast<std::size_t>(i)] = i;
  std::vector<Run> runs;
  std::set<std::int64_t> used;
  for (std::int64_t tries = pick(1, 5); tries > 0; --tries) {
    const Run run{pick(0, kSide), pick(1, 9), pick(1, 5)};
    bool fits = run.last() < kSide;
    for (std::int64_t row = 0; fits && row < run.count; ++row) fits = !used.contains(run.at(row));
    if (!fits) continue;
    for (std::int64_t row = 0; row < run.count; ++row) used.insert(run.at(row));
    runs.push_back(run);
  }
  return Positions(runs);
}

// Disjoint regions: cells of a grid of rectangles, each cut by a diagonal into a lower and an upper part.
std::vector<Region> some_mask() {
  std::vector<Region> mask;
  const auto cut_q = pick(0, kSide + 1), cut_k = pick(0, kSide + 1);
  for (const Interval q : {Interval{0, cut_q}, Interval{cut_q, kSide}}) {
    for (const Interval k : {Interval{0, cut_k}, Interval{cut_k, kSide}}) {
      const auto diagonal = pick(-kSide, kSide + 1);
      const auto width = pick(0, 6);
      if (*rc::gen::arbitrary<bool>()) mask.push_back({q, k, -kUnbounded, diagonal});
      if (*rc::gen::arbitrary<bool>()) mask.push_back({q, k, diagonal + 1, diagonal + width});
    }
  }
  return mask;
}

RC_GTEST_PROP(Tiles, HoldEveryVisiblePairOnceInLocalRows, ()) {
  const std::vector<Region> mask = some_mask();
  const Positions queries = some_positions(), keys = some_positions();
  std::set<Pair> expected;
  for (std::int64_t i = 0; i < queries.count(); ++i) {
    for (std::int64_t j = 0; j < keys.count(); ++j) {
      for (const Region& region : mask) {
        if (region.contains(queries.at(i), keys.at(j))) expected.emplace(i, j);
      }
    }
  }
  const std::vector<Tile> tiles = make_tiles(mask, queries, keys);
  std::set<Pair> found;
  for (const Tile& tile : tiles) {
    RC_ASSERT(area(tile.rows) > 0);
    assert_trimmed(tile.rows);
    for (const auto& [i, j] : pairs_of(tile.rows)) {
      RC_ASSERT(found.emplace(i, j).second);
      RC_ASSERT(queries.at(i) == tile.q_position + (i - tile.rows.q.begin) * tile.step);
      RC_ASSERT(keys.at(j) == tile.k_position + (j - tile.rows.k.begin) * tile.step);
    }
  }
  RC_ASSERT(found == expected);
  RC_ASSERT(area(tiles) == static_cast<std::int64_t>(expected.size()));
  RC_ASSERT(std::is_sorted(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return Pair(a.rows.q.begin, a.rows.k.begin) < Pair(b.rows.q.begin, b.rows.k.begin);
  }));
}

RC_GTEST_PROP(Area, OfRunsAndARangeIsThatOfTheirPairs, ()) {
  const RegionList mask(some_mask());
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

TEST(Tiles, StripedCausalIsOneTileAPair) {
  const std::vector<Region> causal{{{0, 8}, {0, 8}, -kUnbounded, 0}};
  const Positions even({{0, 4, 2}}), odd({{1, 4, 2}});
  const Tile earlier{{{0, 4}, {0, 4}, -kUnbounded, 0}, 0, 0, 2};
  EXPECT_EQ(make_tiles(causal, even, even), std::vector{earlier});
  const Tile later{{{1, 4}, {0, 3}, -kUnbounded, -1}, 2, 1, 2};  // query row i sees key row j < i
  EXPECT_EQ(make_tiles(causal, even, odd), std::vector{later});
}

}  // namespace
}  // namespace dattn
