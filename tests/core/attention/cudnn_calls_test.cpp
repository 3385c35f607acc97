// Tiles as cuDNN's bands: the same pairs, each once, in shapes that cuDNN takes; and who shares which KV head.
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/attention/cudnn/calls.h"
#include "core/attention/mask.h"
#include "tests/core/attention/problem.h"

namespace dattn::cudnn {
namespace {

using ::testing::HasSubstr;
using testing::tiles_of;

using Pairs = std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t>;  // local rows -> position of the key

Pairs pairs_of(std::span<const Tile> tiles) {
  Pairs pairs;
  for (const Tile& tile : tiles) {
    for (std::int64_t i = tile.rows.q.begin; i < tile.rows.q.end; ++i) {
      for (std::int64_t j = tile.rows.k.begin; j < tile.rows.k.end; ++j) {
        if (tile.contains(i, j)) pairs[{i, j}] = tile.k_at(j);
      }
    }
  }
  return pairs;
}

bool visible(const Band& band, std::int64_t i, std::int64_t j) {
  return (!band.right || j <= i + *band.right) && (!band.left || j > i - *band.left);
}

// The pairs of bands whose shape cuDNN takes.
Pairs checked_pairs(const std::vector<Band>& bands) {
  Pairs pairs;
  for (const Band& band : bands) {
    EXPECT_TRUE(!band.left || band.q.count() <= band.k.count()) << band.q.count() << " rows under a left bound";
    EXPECT_GE(band.left.value_or(1), 1);
    EXPECT_GE(band.right.value_or(0), 0);
    for (std::int64_t i = 0; i < band.q.count(); ++i) {
      bool any = false;  // a row that sees nothing has no finite statistics
      for (std::int64_t j = 0; j < band.k.count(); ++j) {
        if (!visible(band, i, j)) continue;
        any = true;
        const bool fresh = pairs.emplace(std::pair{band.q.begin + i, band.k.begin + j}, band.k_position + j * band.step).second;
        EXPECT_TRUE(fresh) << "pair " << band.q.begin + i << ", " << band.k.begin + j << " comes twice";
      }
      EXPECT_TRUE(any) << "row " << band.q.begin + i << " sees nothing";
    }
  }
  return pairs;
}

std::vector<Tile> placed(const Mask& mask, const Positions& queries, const Positions& keys) {
  return make_tiles(compile(mask, 400, 400), queries, keys);
}

Positions zigzag(std::int64_t rank) { return Positions({{rank * 25, 25, 1}, {400 - (rank + 1) * 25, 25, 1}}); }

const Mask kMasks[] = {Mask::full(),
                       Mask::causal(),
                       Mask::window(60, 0),
                       Mask::window(0, 0),
                       Mask::window(9, 30),
                       Mask::window(200, 7),
                       Mask::prefix(70),
                       Mask::global(30, 40, 0, true),
                       Mask::documents({0, 45, 230, 400}, Mask::causal())};

TEST(CudnnCalls, BandsHoldThePairsOfTheTiles) {
  const Positions contiguous[] = {Positions::range(0, 50), Positions::range(50, 100), Positions::range(340, 400)};
  std::vector<std::pair<Positions, Positions>> places;
  for (const Positions& q : contiguous) {
    for (const Positions& k : contiguous) places.emplace_back(q, k);
  }
  for (const std::int64_t a : {0, 3, 7}) {
    for (const std::int64_t b : {0, 3, 7}) {
      places.emplace_back(zigzag(a), zigzag(b));
      places.emplace_back(Positions({{a, 50, 8}}), Positions({{b, 50, 8}}));
    }
  }
  for (const Mask& mask : kMasks) {
    for (const auto& [q, k] : places) {
      SCOPED_TRACE(mask.text());
      const std::vector<Tile> tiles = placed(mask, q, k);
      const Pairs expected = pairs_of(tiles);
      EXPECT_EQ(checked_pairs(bands_of(tiles, true)), expected);  // with the positions of the keys
      Pairs rows = checked_pairs(bands_of(tiles, false));
      ASSERT_EQ(rows.size(), expected.size());
      for (const auto& [pair, position] : expected) EXPECT_TRUE(rows.count(pair) == 1) << pair.first << ", " << pair.second;
    }
  }
}

TEST(CudnnCalls, TheStepsOfARingAreOneCall) {
  const auto only = [](const Mask& mask, const Positions& q, const Positions& k) {
    const std::vector<Band> bands = bands_of(placed(mask, q, k), false);
    EXPECT_EQ(bands.size(), 1u);
    return bands.at(0);
  };
  const Band own{{0, 50}, {0, 50}, std::nullopt, 0, 75, 1};
  EXPECT_EQ(only(Mask::causal(), zigzag(3), zigzag(3)), own);
  EXPECT_EQ(only(Mask::causal(), zigzag(3), zigzag(1)), (Band{{0, 50}, {0, 25}, std::nullopt, std::nullopt, 25, 1}));
  EXPECT_EQ(only(Mask::causal(), zigzag(1), zigzag(3)), (Band{{25, 50}, {0, 50}, std::nullopt, std::nullopt, 75, 1}));
  // Striped, keys of a later rank: the diagonal itself is hidden, so it starts a row later.
  const Band striped = only(Mask::causal(), Positions({{1, 50, 8}}), Positions({{4, 50, 8}}));
  EXPECT_EQ(striped, (Band{{1, 50}, {0, 49}, std::nullopt, 0, 4, 8}));
  EXPECT_EQ(only(Mask::window(10, 5), Positions::range(0, 50), Positions::range(0, 50)), (Band{{0, 50}, {0, 50}, 11, 5, 0, 1}));
}

TEST(CudnnCalls, PositionsKeepTilesApart) {
  EXPECT_EQ(bands_of(placed(Mask::causal(), zigzag(3), zigzag(3)), false).size(), 1u);
  EXPECT_EQ(bands_of(placed(Mask::causal(), zigzag(3), zigzag(3)), true).size(), 2u);
}

TEST(CudnnCalls, HeadsThatShare) {
  using Groups = std::vector<HeadGroup>;
  EXPECT_EQ(head_groups({0, 0, 4}, 8), (Groups{{{0, 8}, {0, 2}}}));
  EXPECT_EQ(head_groups({8, 2, 4}, 4), (Groups{{{0, 4}, {0, 1}}}));
  EXPECT_EQ(head_groups({3, 0, 4}, 3), (Groups{{{0, 1}, {0, 1}}, {{1, 3}, {1, 2}}}));
  EXPECT_EQ(head_groups({3, 0, 4}, 11), (Groups{{{0, 1}, {0, 1}}, {{1, 9}, {1, 3}}, {{9, 11}, {3, 4}}}));
  EXPECT_EQ(head_groups({5, 1, 4}, 2), (Groups{{{0, 2}, {0, 1}}}));
  EXPECT_EQ(head_groups({5, 5, 1}, 6), (Groups{{{0, 6}, {0, 6}}}));
}

TEST(CudnnCalls, WhatIsNotForCudnn) {
  const auto view = [](const Shape& shape) { return TensorView(nullptr, DType::kBF16, shape); };
  const std::vector<Tile> causal = tiles_of(Mask::causal(), 128, 128), short_rows = tiles_of(Mask::causal(), 8, 128);
  AttendArgs args;
  args.q = view({1, 128, 4, 64});
  args.k = args.v = view({1, 128, 2, 64});
  args.heads.group = 2;
  args.tiles = causal;
  EXPECT_TRUE(suits(args).ok);
  const auto why = [&](const auto& change) {
    AttendArgs changed = args;
    change(changed);
    const Support support = suits(changed);
    EXPECT_FALSE(support.ok);
    return support.why;
  };
  const std::vector<double> slopes(4, 0.5);
  std::vector<std::int64_t> boundaries;
  for (std::int64_t at = 0; at <= 128; at += 8) boundaries.push_back(at);
  const std::vector<Tile> documents = tiles_of(Mask::documents(boundaries, Mask::causal()), 128, 128);
  const std::vector<Tile> stairs = placed(Mask::causal(), Positions({{0, 128, 3}}), Positions::range(0, 128));
  EXPECT_THAT(why([&](AttendArgs& a) { a.tiles = stairs; }), HasSubstr("unequal steps"));
  EXPECT_THAT(why([](AttendArgs& a) { a.invariant = true; }), HasSubstr("invariant"));
  EXPECT_THAT(why([](AttendArgs& a) { a.terms.dropout.p = 0.1; }), HasSubstr("dropout"));
  EXPECT_THAT(why([](AttendArgs& a) { a.terms.softcap = 30; }), HasSubstr("softcap"));
  EXPECT_THAT(why([&](AttendArgs& a) { a.terms.alibi_slopes = slopes; }), HasSubstr("ALiBi"));
  EXPECT_THAT(why([&](AttendArgs& a) { a.tiles = documents; }), HasSubstr("16 bands"));
  EXPECT_THAT(why([&](AttendArgs& a) {
                a.q = view({1, 8, 4, 64});
                a.tiles = short_rows;
              }),
              HasSubstr("8 query rows"));
  float bias = 0;
  AttendGradArgs grad;
  grad.q = args.q;
  grad.k = grad.v = args.k;
  grad.heads = args.heads;
  grad.tiles = causal;
  EXPECT_TRUE(suits(grad).ok);
  grad.dbias = TensorView(&bias, DType::kF32, {1, 1, 1, 1});
  EXPECT_THAT(suits(grad).why, HasSubstr("gradient of the bias"));
  args.terms.bias = TensorView(&bias, DType::kF32, {1, 128, 1, 128});
  EXPECT_THAT(suits(args).why, HasSubstr("another type"));
}

}  // namespace
}  // namespace dattn::cudnn
