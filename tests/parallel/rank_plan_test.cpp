// A rank's part of a plan: shared rows, and strides that stay strides when they are gathered.
#include "parallel/rank_plan.h"

#include <gmock/gmock.h>
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

// Keys in global order beside strided queries, and windows narrower than the stride: so many rows one by one are refused.
TEST(RankPlan, TooManySingleRowsAreRefused) {
  const auto refusal = [](const AttentionOptions& options, std::int64_t seq) -> std::string {
    try {
      make_plan(mesh_of(1, 8, 1, 1), {.seq_q = seq, .seq_kv = seq}, options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kBadInput);
      return error.what();
    }
    return "accepted";
  };
  AttentionOptions invariant = striped("auto");
  invariant.determinism = Determinism::kInvariant;
  EXPECT_EQ(refusal(invariant, kMostSingleRows), "accepted");
  EXPECT_THAT(refusal(invariant, kMostSingleRows + 1), testing::HasSubstr("use layout contiguous or zigzag"));
  const Mask narrow = Mask::window(2, 1), wide = Mask::window(7, 0);
  EXPECT_EQ(refusal(striped("fetch", narrow), 8 * kMostSingleRows), "accepted");
  EXPECT_THAT(refusal(striped("fetch", narrow), 8 * kMostSingleRows + 1), testing::HasSubstr("windows narrower"));
  EXPECT_EQ(refusal(striped("fetch", wide), 80 * kMostSingleRows), "accepted");
}

}  // namespace
}  // namespace dattn
