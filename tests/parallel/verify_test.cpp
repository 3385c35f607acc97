// verify() proves the plans of every strategy, whatever the mask, layout, lengths and heads.
#include "parallel/verify.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "parallel/strategy.h"

namespace dattn {
namespace {

void expect_proved(const Plan& forward, double pairs) {
  for (const Plan& plan : {forward, backward(forward)}) {
    const Verdict verdict = verify(plan);
    EXPECT_TRUE(verdict.ok()) << plan.strategy << " on " << plan.problem->mesh.text() << ": " << verdict.problems[0];
    EXPECT_EQ(verdict.pairs, pairs);
  }
}

TEST(Verify, ProvesEveryStrategy) {
  MeshShape mesh;
  mesh.set(Axis::kRing, 3);
  for (const Strategy& strategy : strategies()) {
    AttentionOptions options;
    options.strategy = strategy.name;
    if (strategy.name == "ulysses") {
      MeshShape heads;
      heads.set(Axis::kUlysses, 3);
      expect_proved(make_plan(heads, {1, 37, 37, 4, 2, 8, 8, DType::kF32}, options), 37 * 38 / 2);
    } else {
      expect_proved(make_plan(mesh, {1, 37, 37, 4, 2, 8, 8, DType::kF32}, options), 37 * 38 / 2);
    }
  }
}

// Fewer rows than ranks, fewer heads than ranks, blind rows, masks that differ between batch rows.
TEST(Verify, ProvesPlansOfOddSizes) {
  MeshShape mesh;
  mesh.set(Axis::kRing, 4);
  mesh.set(Axis::kUlysses, 3);
  for (const std::string strategy : {"hybrid", "grid", "fetch", "tree", "allgather"}) {
    for (const Layout layout : {Layout::kContiguous, Layout::kZigzag, Layout::kStriped}) {
      AttentionOptions options;
      options.strategy = strategy;
      options.layout = layout;
      options.mask = Mask::documents({0, 3, 3, 9}, Mask::causal());
      for (const auto& [queries, keys] : {std::pair<std::int64_t, std::int64_t>{11, 5}, {5, 11}, {1, 1}, {0, 4}, {40, 40}}) {
        if (std::max(queries, keys) < 9) continue;
        const Plan plan = make_plan(mesh, {2, queries, keys, 2, 1, 8, 8, DType::kF32}, options);
        expect_proved(plan, verify(plan).pairs);
        auto other = std::make_shared<Problem>(*plan.problem);
        const std::vector<Region> first{{{0, queries}, {0, keys}, -2, 1}};
        const std::vector<Region> second{{{queries / 2, queries}, {0, keys}, -kUnbounded, 0}};
        other->mask = {{{0, 1}, first}, {{1, 2}, second}};
        const Plan mixed = write_plan(find_strategy(strategy), other);
        expect_proved(mixed, verify(mixed).pairs);
      }
    }
  }
}

RC_GTEST_PROP(Verify, ProvesRandomWindows, ()) {
  MeshShape mesh;
  mesh.set(Axis::kRing, *rc::gen::inRange(1, 6));
  mesh.set(Axis::kUlysses, *rc::gen::inRange(1, 4));
  AttentionOptions options;
  options.strategy = "fetch";
  options.layout = *rc::gen::element(Layout::kContiguous, Layout::kZigzag, Layout::kStriped);
  options.mask = Mask::window(*rc::gen::inRange<std::int64_t>(-1, 12), *rc::gen::inRange<std::int64_t>(-1, 12));
  const std::int64_t queries = *rc::gen::inRange<std::int64_t>(1, 60), keys = *rc::gen::inRange<std::int64_t>(1, 60);
  const Plan plan = make_plan(mesh, {1, queries, keys, 4, 2, 8, 8, DType::kF32}, options);
  const Verdict forward = verify(plan), gradient = verify(backward(plan));
  if (!forward.ok()) RC_FAIL(forward.problems[0]);
  if (!gradient.ok()) RC_FAIL(gradient.problems[0]);
}

}  // namespace
}  // namespace dattn
