// Tiles against brute force: those of any runs and regions hold the very pairs, and stairs say of each row what it sees.
#include "core/attention/tile.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "tests/core/attention/some_regions.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

std::set<Pair> pairs_of_tile(const Tile& tile) {
  std::set<Pair> pairs;
  for (std::int64_t q = tile.rows.q.begin; q < tile.rows.q.end; ++q) {
    for (std::int64_t k = tile.rows.k.begin; k < tile.rows.k.end; ++k) {
      if (tile.contains(q, k)) pairs.emplace(q, k);
    }
  }
  return pairs;
}

// The first and the last row and column hold a pair, and a bound that is kept cuts something off. Inner ones of stairs may
// hold none.
void assert_trimmed(const Tile& tile) {
  if (!tile.stairs()) return testing::assert_trimmed(tile.rows);
  RC_ASSERT(tile.q_step != tile.k_step);
  RC_ASSERT(tile.rows == (Region{tile.rows.q, tile.rows.k}));
  Interval q{INT64_MAX, 0}, k{INT64_MAX, 0};
  for (const auto& [i, j] : pairs_of_tile(tile)) {
    q = {std::min(q.begin, i), std::max(q.end, i + 1)};
    k = {std::min(k.begin, j), std::max(k.end, j + 1)};
  }
  RC_ASSERT(q == tile.rows.q);
  RC_ASSERT(k == tile.rows.k);
  RC_ASSERT(tile.lo == -kUnbounded || tile.lo > tile.k_position - tile.q_at(tile.rows.q.end - 1));
  RC_ASSERT(tile.hi == kUnbounded || tile.hi < tile.k_at(tile.rows.k.end - 1) - tile.q_position);
}

RC_GTEST_PROP(Tiles, HoldEveryVisiblePairOnceInLocalRows, ()) {
  const std::vector<Region> mask = some_disjoint_regions();
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
  RC_ASSERT(tiles.size() <= queries.runs().size() * keys.runs().size() * mask.size());
  std::set<Pair> found;
  for (const Tile& tile : tiles) {
    RC_ASSERT(area(tile) > 0);
    assert_trimmed(tile);
    for (const auto& [i, j] : pairs_of_tile(tile)) {
      RC_ASSERT(found.emplace(i, j).second);
      RC_ASSERT(queries.at(i) == tile.q_at(i));
      RC_ASSERT(keys.at(j) == tile.k_at(j));
    }
  }
  RC_ASSERT(found == expected);
  RC_ASSERT(area(tiles) == static_cast<std::int64_t>(expected.size()));
  RC_ASSERT(std::is_sorted(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return Pair(a.rows.q.begin, a.rows.k.begin) < Pair(b.rows.q.begin, b.rows.k.begin);
  }));
}

// The rows that a row of the tile sees must be these, ascending.
void assert_sees(Interval seen, const std::set<std::int64_t>& expected) {
  RC_ASSERT(seen.begin <= seen.end);
  std::set<std::int64_t> rows;
  for (std::int64_t row = seen.begin; row < seen.end; ++row) rows.insert(row);
  RC_ASSERT(rows == expected);
}

// A run of each side that a region of any bounds relates.
struct Case {
  Region region;
  Run q, k;
};
Case some_case() {
  const std::int64_t lo = pick(-90, 60), width = pick(0, 2) == 0 ? pick(0, 12) : pick(0, 90);
  const auto most = [] { return pick(0, 3) == 0 ? pick_interval(250) : Interval{pick(0, 30), pick(120, 250)}; };
  Region region{most(), most(), lo, lo + width};
  if (pick(0, 5) == 0) region.lo = -kUnbounded;
  if (pick(0, 5) == 0) region.hi = kUnbounded;
  return {region, {pick(0, 40), pick(1, 25), pick(1, 10)}, {pick(0, 40), pick(1, 25), pick(1, 10)}};
}

RC_GTEST_PROP(Tiles, OfTwoStepsAreOneThatSaysWhatEveryRowSees, ()) {
  const auto [region, q, k] = some_case();
  std::set<Pair> expected;
  std::vector<std::set<std::int64_t>> of_q(static_cast<std::size_t>(q.count)), of_k(static_cast<std::size_t>(k.count));
  for (std::int64_t i = 0; i < q.count; ++i) {
    for (std::int64_t j = 0; j < k.count; ++j) {
      if (!region.contains(q.at(i), k.at(j))) continue;
      expected.emplace(i, j);
      of_q[static_cast<std::size_t>(i)].insert(j);
      of_k[static_cast<std::size_t>(j)].insert(i);
    }
  }
  const std::vector<Tile> tiles = make_tiles(std::vector{region}, Positions({q}), Positions({k}));
  RC_ASSERT(tiles.size() == (expected.empty() ? 0u : 1u));
  if (tiles.empty()) return;
  const Tile& tile = tiles[0];
  RC_CLASSIFY(tile.stairs());
  assert_trimmed(tile);
  RC_ASSERT(pairs_of_tile(tile) == expected);
  RC_ASSERT(area(tile) == static_cast<std::int64_t>(expected.size()));
  RC_ASSERT(transposed(transposed(tile)) == tile);
  Interval last = tile.rows.k;
  for (std::int64_t i = tile.rows.q.begin; i < tile.rows.q.end; ++i) {
    const Interval seen = keys_of(tile, i);
    assert_sees(seen, of_q[static_cast<std::size_t>(i)]);
    RC_ASSERT(i == tile.rows.q.begin || (seen.begin >= last.begin && seen.end >= last.end));
    last = seen;
  }
  for (std::int64_t j = tile.rows.k.begin; j < tile.rows.k.end; ++j)
    assert_sees(keys_of(transposed(tile), j), of_k[static_cast<std::size_t>(j)]);
}

RC_GTEST_PROP(Tiles, RestrictKeepsExactlyThePairsInsideAndTrims, ()) {
  const auto [region, q, k] = some_case();
  const std::vector<Tile> tiles = make_tiles(std::vector{region}, Positions({q}), Positions({k}));
  if (tiles.empty()) return;
  const Interval q_rows = pick_interval(25), k_rows = pick_interval(25);
  std::set<Pair> expected;
  for (const auto& [i, j] : pairs_of_tile(tiles[0])) {
    if (i >= q_rows.begin && i < q_rows.end && j >= k_rows.begin && j < k_rows.end) expected.emplace(i, j);
  }
  const auto part = restrict_to(tiles[0], q_rows, k_rows);
  RC_ASSERT(part.has_value() == !expected.empty());
  if (!part) return;
  RC_ASSERT(pairs_of_tile(*part) == expected);
  RC_ASSERT(area(*part) == static_cast<std::int64_t>(expected.size()));
  RC_ASSERT(part->q_position == q.at(part->rows.q.begin));
  RC_ASSERT(part->k_position == k.at(part->rows.k.begin));
  assert_trimmed(*part);
}

// Of long runs: as counted beside a range of keys, and turned.
RC_GTEST_PROP(Tiles, AreasOfLongStairsAreExact, ()) {
  const std::int64_t length = std::int64_t{1} << pick(10, 30), step = pick(2, 100), width = pick(0, 3) == 0 ? 5 : length / 3;
  const std::int64_t lo = pick(-length, length);
  const RegionList mask(std::vector<Region>{{{0, length}, {0, length}, lo, lo + width}});
  const Positions strided({{pick(0, step), length / step, step}}), range = Positions::range(pick(0, 50), length);
  RC_ASSERT(area(make_tiles(mask, strided, range)) == area(mask, strided, {range.at(0), length}));
  RC_ASSERT(area(make_tiles(mask, range, strided)) == area(mask, {range.at(0), length}, strided));
}

TEST(Tiles, StripedCausalIsOneTileAPair) {
  const std::vector<Region> causal{{{0, 8}, {0, 8}, -kUnbounded, 0}};
  const Positions even({{0, 4, 2}}), odd({{1, 4, 2}});
  const Tile earlier{{{0, 4}, {0, 4}, -kUnbounded, 0}, 0, 0, 2, 2};
  EXPECT_EQ(make_tiles(causal, even, even), std::vector{earlier});
  const Tile later{{{1, 4}, {0, 3}, -kUnbounded, -1}, 2, 1, 2, 2};  // query row i sees key row j < i
  EXPECT_EQ(make_tiles(causal, even, odd), std::vector{later});
}

TEST(Tiles, OfTwoStepsAreStairs) {
  const std::vector<Region> causal{{{0, 8}, {0, 8}, -kUnbounded, 0}};
  const Positions all = Positions::range(0, 8), odd({{1, 4, 2}});
  const Tile queries{{{0, 4}, {0, 8}}, 1, 0, 2, 1, 0, -kUnbounded, 0};
  EXPECT_EQ(make_tiles(causal, odd, all), std::vector{queries});
  EXPECT_EQ(keys_of(queries, 2), (Interval{0, 6}));
  EXPECT_EQ(keys_of(transposed(queries), 4), (Interval{2, 4}));
  const Tile keys{{{1, 8}, {0, 4}}, 1, 1, 1, 2, 0, -kUnbounded, 0};
  EXPECT_EQ(make_tiles(causal, all, odd), std::vector{keys});
  const Tile full{{{0, 8}, {0, 4}}, 0, 1, 1, 2};  // no bound cuts anything
  EXPECT_EQ(make_tiles({std::vector<Region>{{{0, 8}, {0, 8}}}}, all, odd), std::vector{full});
}

}  // namespace
}  // namespace dattn
