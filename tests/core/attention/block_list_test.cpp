// Block lists hold the very pairs of the tiles, and cost no more than what is visible.
#include "core/attention/block_list.h"

#include <gtest/gtest.h>

#include "tests/core/attention/problem.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

using Pairs = std::vector<std::vector<bool>>;  // [rows][columns]

Pairs pairs_of(std::span<const Tile> tiles, std::int64_t rows, std::int64_t columns, bool by_key) {
  Pairs pairs(static_cast<std::size_t>(rows), std::vector<bool>(static_cast<std::size_t>(columns)));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      for (const Tile& tile : tiles) {
        if (by_key ? tile.rows.contains(column, row) : tile.rows.contains(row, column))
          pairs[static_cast<std::size_t>(row)][static_cast<std::size_t>(column)] = true;
      }
    }
  }
  return pairs;
}

// The pairs of a list; asserts that pieces ascend, and that nothing lies past the ends.
Pairs pairs_of(const BlockList& list, std::int64_t rows, std::int64_t columns) {
  Pairs pairs(static_cast<std::size_t>(rows), std::vector<bool>(static_cast<std::size_t>(columns)));
  for (int block = 0; block < list.blocks(); ++block) {
    std::int32_t end = 0;
    for (auto i = list.offsets[static_cast<std::size_t>(block)]; i < list.offsets[static_cast<std::size_t>(block) + 1]; ++i) {
      const BlockPiece& piece = list.pieces[static_cast<std::size_t>(i)];
      RC_ASSERT(piece.begin >= end && piece.begin < piece.end);
      end = piece.end;
      for (std::int64_t row = 0; row < list.block_rows; ++row) {
        const auto word_at = static_cast<std::size_t>(std::int64_t{piece.mask} * list.block_rows + row);
        const std::uint64_t word = piece.mask < 0 ? ~std::uint64_t{0} : list.masks[word_at];
        const std::int64_t global = block * list.block_rows + row;
        RC_ASSERT(global < rows || piece.mask < 0 || word == 0);
        for (std::int64_t column = std::int64_t{piece.begin} * 64; global < rows && column < std::int64_t{piece.end} * 64;
             ++column) {
          const bool seen = (word >> (column % 64) & 1) != 0;
          RC_ASSERT(column < columns || !seen);
          if (seen) pairs[static_cast<std::size_t>(global)][static_cast<std::size_t>(column)] = true;
        }
      }
    }
  }
  return pairs;
}

Positions some_rows() {
  const std::int64_t begin = pick(0, 90), step = pick(1, 4), count = pick(1, 200);
  if (pick(0, 2) == 0) return Positions({{begin, count, step}});
  return Positions({{begin, count, step}, {begin + count * step + pick(0, 50), pick(1, 150), pick(1, 4)}});
}

std::vector<Region> some_mask_of_regions() {
  std::vector<Region> regions;
  for (std::int64_t i = pick(1, 5); i > 0; --i) {
    Region region{pick_interval(1000), pick_interval(1000)};
    if (pick(0, 2) == 0) region.lo = pick(-300, 200);
    if (pick(0, 2) == 0) region.hi = std::max<std::int64_t>(region.lo, -300) + pick(0, 300);
    regions.push_back(region);
  }
  return compile(Mask::of_regions(regions, Mask::Overlap::kFirst), 1000, 1000);
}

TEST(BlockList, HoldsTheTilesPairs) {
  EXPECT_TRUE(rc::check([] {
    const Positions queries = some_rows(), keys = some_rows();
    const std::vector<Tile> tiles = make_tiles(some_mask_of_regions(), queries, keys);
    const bool by_key = pick(0, 2) == 1;
    const std::int64_t rows = by_key ? keys.count() : queries.count(), columns = by_key ? queries.count() : keys.count();
    const BlockList list = make_block_list(tiles, rows, pick(0, 2) == 0 ? 64 : 128, by_key);
    RC_ASSERT(pairs_of(list, rows, columns) == pairs_of(tiles, rows, columns, by_key));
  }));
}

// Tiles that are cut into rows and halves give the same list.
TEST(BlockList, DoesNotShowHowTilesWereCut) {
  const std::vector<Tile> whole = testing::tiles_of(Mask::window(150, 20), 300, 330);
  std::vector<Tile> parts;
  for (const Tile& tile : whole) {
    for (std::int64_t row = 0; row < 300; ++row) {
      for (const Interval keys : {Interval{0, 100}, Interval{100, 330}}) {
        if (const auto part = restrict_to(tile.rows, {row, row + 1}, keys)) parts.push_back({*part});
      }
    }
  }
  for (const bool by_key : {false, true}) {
    const BlockList a = make_block_list(whole, by_key ? 330 : 300, 64, by_key),
                    b = make_block_list(parts, by_key ? 330 : 300, 64, by_key);
    ASSERT_EQ(a.pieces.size(), b.pieces.size());
    for (std::size_t i = 0; i < a.pieces.size(); ++i) {
      EXPECT_EQ(a.pieces[i].begin, b.pieces[i].begin);
      EXPECT_EQ(a.pieces[i].end, b.pieces[i].end);
      EXPECT_EQ(a.pieces[i].mask, b.pieces[i].mask);
    }
    EXPECT_EQ(a.masks, b.masks);
  }
}

TEST(BlockList, CostsWhatIsVisible) {
  constexpr std::int64_t kSeq = 1 << 17, kBlocks = kSeq / 64;
  const BlockList causal = make_block_list(testing::tiles_of(Mask::causal(), kSeq, kSeq), kSeq, 64, false);
  EXPECT_EQ(causal.pieces.size(), 2 * kBlocks - 1);
  EXPECT_EQ(causal.masks.size(), 64);
  EXPECT_EQ(causal.order.front(), kBlocks - 1);  // has most work
  std::vector<std::int64_t> bounds;
  for (std::int64_t i = 0; i <= 4096; ++i) bounds.push_back(i * 32);
  const auto tiles = testing::tiles_of(Mask::documents(bounds, Mask::causal()), kSeq, kSeq);
  const BlockList documents = make_block_list(tiles, kSeq, 64, true);
  EXPECT_EQ(documents.pieces.size(), kBlocks);
  EXPECT_EQ(documents.masks.size(), 64);
}

}  // namespace
}  // namespace dattn
