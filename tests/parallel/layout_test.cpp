#include "parallel/layout.h"

#include <algorithm>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/attention/mask.h"
#include "core/base/error.h"
#include "parallel/mesh.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

TEST(Layout, EveryPositionHasOneOwner) {
  for (const Layout layout : {Layout::kContiguous, Layout::kZigzag, Layout::kStriped}) {
    for (const std::int64_t length : {0, 1, 2, 5, 8, 13, 64, 97}) {
      for (const int parts : {1, 2, 3, 4, 6, 8}) {
        std::vector<std::int64_t> all;
        std::int64_t least = length, most = 0;
        for (int i = 0; i < parts; ++i) {
          const auto own = positions_of(layout, length, parts, i).list();
          least = std::min<std::int64_t>(least, static_cast<std::int64_t>(own.size()));
          most = std::max<std::int64_t>(most, static_cast<std::int64_t>(own.size()));
          all.insert(all.end(), own.begin(), own.end());
        }
        std::sort(all.begin(), all.end());
        ASSERT_EQ(static_cast<std::int64_t>(all.size()), length) << name_of(layout);
        for (std::int64_t i = 0; i < length; ++i) ASSERT_EQ(all[static_cast<std::size_t>(i)], i) << name_of(layout);
        EXPECT_LE(most - least, layout == Layout::kZigzag ? 2 : 1) << name_of(layout) << " " << length << " " << parts;
      }
    }
  }
}

TEST(Layout, ZigzagIsTheDualChunkOrderOfMegatron) {
  EXPECT_EQ(positions_of(Layout::kZigzag, 16, 2, 0).text(), "[0,4) [12,16)");
  EXPECT_EQ(positions_of(Layout::kZigzag, 16, 2, 1).text(), "[4,8) [8,12)");
  EXPECT_EQ(positions_of(Layout::kStriped, 10, 4, 1).text(), "1:10:4");
}

// Every position once, rows even to one block, work even to 2 % of the mean, for masks that no fixed layout balances.
TEST(Layout, BalancedSharesOutTheVisibleArea) {
  const std::int64_t length = 16384;
  std::vector<std::int64_t> bounds{0};
  for (std::int64_t size = 37; bounds.back() < length; size = size * 7 % 2311 + 20)
    bounds.push_back(std::min(length, bounds.back() + size));
  for (const Mask& mask : {Mask::causal(), Mask::window(512, 0), Mask::documents(bounds, Mask::causal()),
                           Mask::global(64, 128, 0), Mask::global(700, 5, 5), Mask::global(40, 100, 0, true),
                           Mask::of_regions({{{0, length}, {0, 4000}, -kUnbounded, kUnbounded},
                                             {{4000, length}, {4000, length}, -kUnbounded, 0}})}) {
    const CompiledMask compiled = compile_batch(mask, 2, length, length);
    for (const int parts : {1, 3, 8, 64}) {
      const std::vector<Positions> shares = balanced_positions(compiled, length, parts);
      std::vector<Interval> ranges;
      std::int64_t rows = 0;
      double most = 0, sum = 0;
      for (const Positions& share : shares) {
        for (const dattn::Run& run : share.runs()) ranges.push_back({run.begin, run.last() + 1});
        rows += share.count();
        EXPECT_NEAR(static_cast<double>(share.count()), static_cast<double>(length) / parts, 2.0 + length / (32.0 * parts));
        const double seen = area(make_tiles(compiled, share, Positions::range(0, length)));
        most = std::max(most, seen);
        sum += seen;
      }
      EXPECT_EQ(join(ranges), (std::vector<Interval>{{0, length}}));
      EXPECT_EQ(rows, length);
      EXPECT_LE(most, 1.02 * sum / parts) << mask.text() << " on " << parts;
    }
  }
}

// Mean over most of the pairs that the parts of layout balanced see.
double evenness(const CompiledMask& mask, std::int64_t length, int parts) {
  std::int64_t most = 0, sum = 0;
  for (const Positions& share : balanced_positions(mask, length, parts)) {
    const std::int64_t seen = area(mask[0].regions, share, {0, length});
    most = std::max(most, seen);
    sum += seen;
  }
  return most == 0 ? 1.0 : static_cast<double>(sum) / parts / static_cast<double>(most);
}

// Any mask is shared out to 2 % where there are more rows a part than blocks and none of them is 2 % of a share: parts hold
// equally many rows, so one may have a heavy row more than another.
RC_GTEST_PROP(Layout, BalancedIsEvenWhereNoRowIsHeavy, ()) {
  const int parts = *rc::gen::inRange(2, 13);
  const std::int64_t length = parts * *rc::gen::inRange<std::int64_t>(64, 600);
  const auto pick = [](std::int64_t from, std::int64_t to) { return *rc::gen::inRange(from, to); };
  const std::int64_t tokens = pick(0, length / 8), left = pick(0, length / 2), right = pick(0, 40);
  std::vector<std::int64_t> bounds{0, pick(0, length), pick(0, length), pick(0, length)};
  std::sort(bounds.begin(), bounds.end());
  const Mask mask = *rc::gen::element(
      Mask::global(tokens, left, right), Mask::global(tokens, left, 0, true), Mask::prefix(tokens), Mask::window(left, right),
      Mask::documents(bounds, Mask::causal()), Mask::documents(bounds, Mask::window(left, right)),
      Mask::of_regions({{{0, tokens}, {0, length}, -left, right}, {{tokens, length}, {0, tokens}, -length, -left}}));
  const CompiledMask compiled = compile_batch(mask, 1, length, length);
  std::int64_t heaviest = 0;
  for (std::int64_t row = 0; row < length; ++row)
    heaviest = std::max(heaviest, area(compiled[0].regions, Positions::range(row, row + 1), {0, length}));
  const double mean = static_cast<double>(area(compiled[0].regions)) / parts;
  RC_PRE(static_cast<double>(heaviest) * 50 <= mean);
  const double reached = evenness(compiled, length, parts);
  RC_LOG() << mask.text() << " of " << length << " positions on " << parts << " parts: " << reached << "\n";
  RC_ASSERT(reached >= 0.98);
}

// Where parts have fewer blocks.
TEST(Layout, BalancedIsEvenOnThousandsOfParts) {
  const std::int64_t length = 1 << 20;
  std::vector<std::int64_t> bounds{0};
  for (std::int64_t i = 1; i < 100; ++i) bounds.push_back(i * length / 100 + i * 7919 % 9973);
  bounds.push_back(length);
  for (const Mask& mask : {Mask::causal(), Mask::window(4096, 0), Mask::prefix(30000), Mask::global(64, 1000, 0, true),
                           Mask::documents(bounds, Mask::causal())}) {
    const CompiledMask compiled = compile_batch(mask, 1, length, length);
    for (const int parts : {1500, 4096}) {
      EXPECT_GE(evenness(compiled, length, parts), 0.98) << mask.text() << " on " << parts;
      for (const Positions& share : balanced_positions(compiled, length, parts))
        ASSERT_NEAR(static_cast<double>(share.count()) * parts / length, 1, 0.2) << mask.text() << " on " << parts;
    }
  }
}

// A row that sees more than a part's share can be held by one part only, which holds as many other rows as the others do.
TEST(Layout, BalancedIsAsEvenAsTheHeaviestRowAllows) {
  const CompiledMask mask = compile_batch(Mask::global(1, 3, 0), 1, 4096, 4096);  // row 0 sees 4096, the others 5
  EXPECT_NEAR(evenness(mask, 4096, 16), static_cast<double>(area(mask[0].regions)) / 16 / (4096 + 255 * 5), 0.01);
}

TEST(Layout, UnknownNamesAreRefused) {
  EXPECT_EQ(layout_from("striped"), Layout::kStriped);
  EXPECT_THROW(layout_from("zigzagged"), Error);
}

TEST(Mesh, CoordinatesGroupsAndNeighbours) {
  MeshShape mesh;
  mesh.set(Axis::kData, 2);
  mesh.set(Axis::kRing, 3);
  mesh.set(Axis::kUlysses, 2);
  mesh.set(Axis::kTensor, 2);
  ASSERT_EQ(mesh.ranks(), 24);
  EXPECT_EQ(mesh.text(), "data 2 x ring 3 x ulysses 2 x tensor 2");
  for (int rank = 0; rank < 24; ++rank) {
    int rebuilt = 0;
    for (const Axis axis : kAxes) rebuilt = rebuilt * mesh.size(axis) + mesh.coordinate(rank, axis);
    EXPECT_EQ(rebuilt, rank);
    EXPECT_EQ(mesh.sequence_index(rank), mesh.coordinate(rank, Axis::kRing) * 2 + mesh.coordinate(rank, Axis::kUlysses));
    for (const Axis axis : kAxes) {
      const auto group = mesh.group(rank, std::array{axis});
      ASSERT_EQ(static_cast<int>(group.size()), mesh.size(axis));
      for (int i = 0; i < mesh.size(axis); ++i) EXPECT_EQ(group[static_cast<std::size_t>(i)], mesh.neighbour(rank, axis, i));
    }
  }
  EXPECT_EQ(mesh.group(13, std::array{Axis::kRing, Axis::kUlysses}), (std::vector<int>{13, 15, 17, 19, 21, 23}));
}

}  // namespace
}  // namespace dattn
