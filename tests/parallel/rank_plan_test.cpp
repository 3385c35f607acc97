// A rank's part of a plan: shared rows, and strides that stay strides when they are gathered.
#include "parallel/rank_plan.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

// Distinct ascending positions as runs of any steps, in any order of runs.
Positions some_positions() {
  std::vector<Run> runs;
  std::int64_t next = *rc::gen::inRange(0, 6);
  for (int i = *rc::gen::inRange(0, 6); i > 0; --i) {
    runs.push_back({next, *rc::gen::inRange(1, 12), *rc::gen::inRange(1, 9)});
    next = runs.back().last() + *rc::gen::inRange(1, 5);
  }
  for (std::size_t i = runs.size(); i > 1; --i) std::swap(runs[i - 1], runs[*rc::gen::inRange<std::size_t>(0, i)]);
  return Positions(runs);
}

RC_GTEST_PROP(SharedRows, AreThoseOfBothBlocksOnce, ()) {
  const Positions a = some_positions(), b = some_positions();
  const std::vector<std::int64_t> in_a = a.list(), in_b = b.list();
  std::vector<std::int64_t> expected, found;
  for (const std::int64_t position : in_a) {
    if (std::find(in_b.begin(), in_b.end(), position) != in_b.end()) expected.push_back(position);
  }
  std::int64_t before = -1;
  for (const SharedRows& rows : shared_rows(a, b)) {
    RC_ASSERT(rows.row_a > before);
    before = rows.row_a;
    const std::vector<std::int64_t> here = a.rows(rows.row_a, rows.count, rows.step_a).list();
    RC_ASSERT(here == b.rows(rows.row_b, rows.count, rows.step_b).list());
    found.insert(found.end(), here.begin(), here.end());
  }
  std::sort(expected.begin(), expected.end());
  std::sort(found.begin(), found.end());
  RC_ASSERT(found == expected);
}

AttentionOptions striped(std::string_view strategy, const Mask& mask = Mask::causal()) {
  AttentionOptions options;
  options.strategy = strategy;
  options.layout = Layout::kStriped;
  options.mask = mask;
  return options;
}

std::size_t pieces_of(const RankPlan& mine) {
  std::size_t pieces = 0;
  for (const RankStep& step : mine.steps) pieces += step.sends.size() + step.receives.size();
  return pieces;
}

// However long the sequence, what is gathered of strides is a few runs, a few pieces and a few tiles, and is proved.
TEST(RankPlan, GatheredStridesStayStrides) {
  const AttentionShape shape{1, 999'999'937, 999'999'937, 8, 2, 32, 32, DType::kBF16};
  const MeshShape meshes[] = {mesh_of(1, 8, 1, 1), mesh_of(1, 1, 8, 1), mesh_of(1, 3, 2, 1), mesh_of(1, 2, 2, 1, 2),
                              mesh_of(1, 2, 1, 1, 2, 2)};
  int planned = 0;
  for (const Strategy& strategy : strategies()) {
    for (const MeshShape& mesh : meshes) {
      const auto problem = make_problem(mesh, shape, striped(strategy.name));
      if (!strategy.accepts(*problem).ok || problem->invariant) continue;
      const Plan forward = write_plan(strategy, problem);
      for (const Plan& plan : {forward, backward(forward)}) {
        const Verdict verdict = verify(plan);
        EXPECT_TRUE(verdict.ok()) << strategy.name << " on " << mesh.text() << ": " << verdict.problems[0];
        const RankPlan mine = make_rank_plan(plan, mesh.ranks() - 1);
        EXPECT_LE(pieces_of(mine), 400u) << strategy.name << " on " << mesh.text();
        for (const RankStep& step : mine.steps) {
          for (const BatchTiles& part : step.tiles())
            EXPECT_LE(part.tiles.size(), 64u) << strategy.name << " on " << mesh.text();
        }
        ++planned;
      }
    }
  }
  EXPECT_GE(planned, 30);
}

// The operations of all ranks of a plan whose every attend has one tile, stairs.
double flops_of_stairs(const Plan& plan) {
  double flops = 0;
  int attends = 0;
  for (int rank = 0; rank < plan.problem->mesh.ranks(); ++rank) {
    const RankPlan mine = make_rank_plan(plan, rank);
    flops += mine.flops();
    for (const RankStep& step : mine.steps) {
      if (step.tiles().empty()) continue;
      ++attends;
      EXPECT_EQ(step.tiles()[0].tiles.size(), 1u);
      EXPECT_TRUE(step.tiles()[0].tiles[0].stairs());
    }
  }
  EXPECT_GE(attends, plan.problem->mesh.ranks());
  return flops;
}

// Strided queries beside keys in global order, and the other way round in backward, however long the sequence.
TEST(RankPlan, InvariantStridesAreStairs) {
  AttentionOptions options = striped("auto");
  options.determinism = Determinism::kInvariant;
  constexpr std::int64_t kSeq = std::int64_t{1} << 24;
  const AttentionShape shape{1, kSeq, kSeq, 8, 2, 64, 64, DType::kBF16};
  const Plan forward = make_plan(mesh_of(1, 8, 1, 1), shape, options), back = backward(forward);
  const double pairs = static_cast<double>(kSeq) * (kSeq + 1) / 2;
  EXPECT_EQ(flops_of_stairs(forward), pairs * 8 * 2 * (64 + 64));
  EXPECT_GT(flops_of_stairs(back), pairs * 8 * 2 * (64 + 64));
  EXPECT_TRUE(verify(forward).ok());
  EXPECT_TRUE(verify(back).ok());
}

// Windows narrower than the stride leave gaps between the keys to fetch. Of up to kMostSeenRanges rows a rank none of these
// keys is fetched; of more they come along, are counted, and the plan is small and proved.
TEST(RankPlan, GapsBetweenNarrowWindowsOfManyRowsAreFetchedToo) {
  const auto fetched = [](std::int64_t rows) {
    const AttentionShape shape{1, 8 * rows, 8 * rows, 1, 1, 8, 8, DType::kBF16};
    const Plan plan = make_plan(mesh_of(1, 8, 1, 1), shape, striped("fetch", Mask::window(2, 1)));
    const RankPlan mine = make_rank_plan(plan, 3);
    EXPECT_LE(pieces_of(mine), 16u);
    EXPECT_TRUE(verify(plan).ok());
    return mine.cost.bytes_received / (2 * (8 + 8));
  };
  EXPECT_EQ(fetched(kMostSeenRanges), 3 * kMostSeenRanges);
  EXPECT_NEAR(static_cast<double>(fetched(kMostSeenRanges + 1)), 7.0 * kMostSeenRanges, 16);
}

// What is fetched of strides is strides, although the ranges of keys are as many as the rows.
TEST(RankPlan, FetchedStridesStayStrides) {
  const AttentionShape shape{1, 1 << 18, 1 << 18, 8, 2, 32, 32, DType::kBF16};
  const Plan plan = make_plan(mesh_of(1, 8, 1, 1), shape, striped("fetch", Mask::window(2, 1)));
  const RankPlan mine = make_rank_plan(plan, 3);
  EXPECT_LE(pieces_of(mine), 8u);
  for (const RankStep& step : mine.steps) {
    if (!step.tiles().empty()) {
      EXPECT_LE(step.tiles()[0].tiles.size(), 4u);
    }
  }
  EXPECT_TRUE(verify(plan).ok());
}

}  // namespace
}  // namespace dattn
