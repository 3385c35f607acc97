// Block lists hold the very pairs of the tiles, and cost no more than what is visible.
#include "core/attention/block_list.h"

#include <gtest/gtest.h>

#include "tests/core/attention/problem.h"
#include "tests/core/attention/some_regions.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

using Pairs = std::vector<std::vector<bool>>;  // [rows][columns]

Pairs pairs_of(std::span<const Tile> tiles, std::int64_t rows, std::int64_t columns, bool by_key) {
  Pairs pairs(static_cast<std::size_t>(rows), std::vector<bool>(static_cast<std::size_t>(columns)));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      for (const Tile& tile : tiles) {
        if (by_key ? tile.contains(column, row) : tile.contains(row, column))
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

void expect_equal(const BlockList& a, const BlockList& b) {
  ASSERT_EQ(a.pieces.size(), b.pieces.size());
  for (std::size_t i = 0; i < a.pieces.size(); ++i) {
    EXPECT_EQ(a.pieces[i].begin, b.pieces[i].begin);
    EXPECT_EQ(a.pieces[i].end, b.pieces[i].end);
    EXPECT_EQ(a.pieces[i].mask, b.pieces[i].mask);
  }
  EXPECT_EQ(a.masks, b.masks);
}

// Tiles that are cut into rows and halves give the same list.
TEST(BlockList, DoesNotShowHowTilesWereCut) {
  const RegionList window(compile(Mask::window(150, 20), 900, 900));
  for (const std::int64_t q_step : {1, 3}) {
    const Positions queries({{0, 300, q_step}}), keys({{5, 330, 1}});
    const std::vector<Tile> whole = make_tiles(window, queries, keys);
    EXPECT_EQ(whole.size(), 1u);
    EXPECT_EQ(whole[0].stairs(), q_step == 3);
    std::vector<Tile> parts;
    for (std::int64_t row = 0; row < 300; ++row) {
      for (const Interval half : {Interval{0, 100}, Interval{100, 330}}) {
        if (const auto part = restrict_to(whole[0], {row, row + 1}, half)) parts.push_back(*part);
      }
    }
    for (const bool by_key : {false, true}) {
      const std::int64_t rows = by_key ? 330 : 300;
      expect_equal(make_block_list(whole, rows, 64, by_key), make_block_list(parts, rows, 64, by_key));
    }
  }
}

TEST(BlockList, CostsWhatIsVisible) {
  constexpr std::int64_t kSeq = 1 << 17, kBlocks = kSeq / 64;
  const BlockList causal = make_block_list(tiles_of(Mask::causal(), kSeq, kSeq), kSeq, 64, false);
  EXPECT_EQ(causal.pieces.size(), 2 * kBlocks - 1);
  EXPECT_EQ(causal.masks.size(), 64);
  EXPECT_EQ(causal.order.front(), kBlocks - 1);  // has most work
  std::vector<std::int64_t> bounds;
  for (std::int64_t i = 0; i <= 4096; ++i) bounds.push_back(i * 32);
  const auto tiles = tiles_of(Mask::documents(bounds, Mask::causal()), kSeq, kSeq);
  const BlockList documents = make_block_list(tiles, kSeq, 64, true);
  EXPECT_EQ(documents.pieces.size(), kBlocks);
  EXPECT_EQ(documents.masks.size(), 64);
}

// Stairs: a few pieces for each block of rows, whose masks come again and again.
TEST(BlockList, StairsCostWhatIsVisible) {
  constexpr std::int64_t kSeq = 1 << 20, kStep = 8, kRows = kSeq / kStep;
  const Positions strided({{3, kRows, kStep}}), all = Positions::range(0, kSeq);
  const RegionList causal(compile(Mask::causal(), kSeq, kSeq)), narrow(compile(Mask::window(1, 0), kSeq, kSeq));
  const BlockList by_query = make_block_list(make_tiles(causal, strided, all), kRows, 64, false);
  EXPECT_LE(by_query.pieces.size(), (kStep + 1) * kRows / 64);
  EXPECT_LE(by_query.masks.size(), (kStep + 1) * 64);
  const BlockList by_key = make_block_list(make_tiles(causal, all, strided), kRows, 64, true);
  EXPECT_LE(by_key.pieces.size(), (kStep + 1) * kRows / 64 + 1);
  EXPECT_LE(by_key.masks.size(), (kStep + 1) * 64);
  EXPECT_EQ(make_block_list(make_tiles(narrow, strided, all), kRows, 64, false).pieces.size(), kStep * kRows / 64);
  const Positions sparse({{3, 64, 1000}});  // blocks of columns between the rows' windows are not listed
  EXPECT_EQ(make_block_list(make_tiles(narrow, sparse, all), 64, 64, false).pieces.size(), 64u);
}

// Shares of a few rows' columns: the same blocks in the same order, none longer than asked.
TEST(BlockList, SharesHoldTheBlocksOfTheirList) {
  for (const Mask& mask :
       {Mask::full(), Mask::causal_bottom_right(), Mask::window(900, 0), Mask::blocks(50, {{0, 1}, {0, 7}, {0, 29}})}) {
    const BlockList list = make_block_list(testing::tiles_of(mask, 5, 1500), 5, 64, false);
    for (const std::int32_t columns : {1, 3, 8, 100}) {
      const BlockList cut = cut_into_shares(list, columns);
      EXPECT_EQ(cut.blocks(), (column_blocks(list) + columns - 1) / columns);
      EXPECT_EQ(cut.masks, list.masks);
      std::vector<std::pair<std::int32_t, std::int32_t>> wanted, got;  // block and mask
      const auto each = [](const BlockPiece& piece, auto& blocks) {
        for (std::int32_t block = piece.begin; block < piece.end; ++block) blocks.emplace_back(block, piece.mask);
      };
      for (const BlockPiece& piece : list.pieces) each(piece, wanted);
      for (int share = 0; share < cut.blocks(); ++share) {
        const auto at = static_cast<std::size_t>(share);
        const std::size_t before = got.size();
        for (auto i = cut.offsets[at]; i < cut.offsets[at + 1]; ++i) each(cut.pieces[static_cast<std::size_t>(i)], got);
        EXPECT_GT(got.size(), before);
        EXPECT_LE(got.size(), before + static_cast<std::size_t>(columns));
      }
      EXPECT_EQ(got, wanted) << columns;
    }
  }
}

}  // namespace
}  // namespace dattn
