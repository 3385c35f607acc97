// Band lists hold the very pairs of the tiles, at their positions, in every cut of the keys.
#include "core/attention/cpu/band_list.h"

#include <map>
#include <set>

#include <gtest/gtest.h>

#include "tests/core/attention/some_regions.h"

namespace dattn::cpu {
namespace {

using namespace dattn::testing;  // NOLINT: the helpers of this folder

// Visible pairs of local rows and their positions, once each.
using Placed = std::map<Pair, Pair>;

void add_pair(Pair rows, Pair positions, Placed& pairs) { RC_ASSERT(pairs.emplace(rows, positions).second); }

Placed pairs_of(std::span<const Tile> tiles) {
  Placed pairs;
  for (const Tile& tile : tiles) {
    for (std::int64_t q = tile.rows.q.begin; q < tile.rows.q.end; ++q) {
      for (std::int64_t k = tile.rows.k.begin; k < tile.rows.k.end; ++k) {
        if (tile.contains(q, k)) add_pair({q, k}, {tile.q_at(q), tile.k_at(k)}, pairs);
      }
    }
  }
  return pairs;
}

// What a band says it shows (ops.h), in rows from `row` and keys from `key` on.
void add_band(const Band& band, std::int64_t row, std::int64_t key, Placed& pairs) {
  KeyRange last{0, 0};
  for (std::int64_t r = band.row_begin; r < band.row_end; ++r) {
    KeyRange seen{r + band.lo, r + band.hi + 1};
    if (band.ranges != nullptr) {
      const KeyRange range = band.ranges[r - band.row_begin];
      RC_ASSERT(range.begin <= range.end && range.begin >= last.begin && range.end >= last.end);
      last = range;
      seen = {range.begin - band.first_key, range.end - band.first_key};
    }
    for (std::int64_t k = std::max(seen.begin, band.k_begin); k < std::min(seen.end, band.k_end); ++k) {
      add_pair({row + r, key + k},
               {band.q_position + (r - band.row_begin) * band.q_step, band.k_position + (k - band.k_begin) * band.k_step},
               pairs);
    }
  }
}

TEST(BandList, HoldsTheTilesPairs) {
  EXPECT_TRUE(rc::check([] {
    const Positions queries = some_rows(), keys = some_rows();
    const std::vector<Tile> tiles = make_tiles(some_mask_of_regions(), queries, keys);
    const Placed expected = pairs_of(tiles);
    const std::int64_t block_rows = pick(1, 200), cut = pick(1, 200);
    std::int64_t first_key = keys.count();
    for (const Tile& tile : tiles) first_key = std::min(first_key, tile.rows.k.begin);
    const bool invariant = pick(0, 2) == 1;
    const BandList list(tiles, queries.count(), block_rows, first_key, invariant);
    Placed whole, pieces, parts;
    std::vector<Band> bands;
    for (std::int64_t block = 0; block < list.blocks(); ++block) {
      const std::size_t before = whole.size();
      for (const Band& band : list.block(block)) add_band(band, block * block_rows, first_key, whole);
      RC_ASSERT(list.area(block) == static_cast<std::int64_t>(whole.size() - before));
      for (std::int64_t begin = 0; begin < keys.count(); begin += cut) {
        list.in_range(block, begin, begin + cut, bands);
        for (const Band& band : bands) {
          RC_ASSERT(band.k_begin >= 0 && band.k_end <= cut);
          add_band(band, block * block_rows, first_key + begin, pieces);
        }
      }
    }
    for (std::int64_t begin = 0; begin < keys.count(); begin += cut) {
      const BandList part(tiles, queries.count(), block_rows, first_key, invariant, {begin, begin + cut});
      for (std::int64_t block = 0; block < part.blocks(); ++block) {
        for (const Band& band : part.block(block)) {
          RC_ASSERT(first_key + band.k_begin >= begin && first_key + band.k_end <= begin + cut);
          add_band(band, block * block_rows, first_key, parts);
        }
      }
    }
    RC_ASSERT(whole == expected);
    RC_ASSERT(pieces == expected);
    RC_ASSERT(parts == expected);
  }));
}

// Where steps differ there are as many bands as where they are equal.
TEST(BandList, StairsAreABandOfABlock) {
  const RegionList causal(compile(Mask::causal(), 1000, 1000));
  const std::vector<Tile> tiles = make_tiles(causal, Positions({{2, 300, 3}}), Positions::range(0, 1000));
  const BandList list(tiles, 300, 96, 0, true);
  for (std::int64_t block = 0; block < list.blocks(); ++block) EXPECT_EQ(list.block(block).size(), 1u);
}

// Block 0 of a global mask sees all keys, the others a window.
TEST(BandList, HeaviestBlocksComeFirst) {
  constexpr std::int64_t kSeq = 1000, kRows = 96;
  const auto lists_of = [&](const Mask& mask) {
    const std::vector<Tile> tiles =
        make_tiles(RegionList(compile(mask, kSeq, kSeq)), Positions::range(0, kSeq), Positions::range(0, kSeq));
    std::vector<BandList> halves;
    for (const Interval keys : {Interval{0, 500}, Interval{500, kSeq}}) halves.emplace_back(tiles, kSeq, kRows, 0, false, keys);
    return halves;
  };
  const std::vector<BandList> global = lists_of(Mask::global(40, 50, 0)), causal = lists_of(Mask::causal());
  EXPECT_EQ(heaviest_first(global).front().block, 0);
  EXPECT_EQ(heaviest_first(causal).front().list, 0);  // rows from 500 on see all of the first half
  for (const auto* lists : {&global, &causal}) {
    std::set<std::pair<std::int64_t, std::int64_t>> seen;
    std::int64_t last = kRows * kSeq;
    for (const auto& [list, block] : heaviest_first(*lists)) {
      const std::int64_t area = (*lists)[static_cast<std::size_t>(list)].area(block);
      EXPECT_LE(area, last);
      last = area;
      seen.emplace(list, block);
    }
    EXPECT_EQ(seen.size(), 2 * static_cast<std::size_t>(div_up(kSeq, kRows)));
  }
}

}  // namespace
}  // namespace dattn::cpu
