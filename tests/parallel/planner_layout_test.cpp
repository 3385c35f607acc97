// Layouts as the planner compares them: which one it takes for which mask, what it says about it, and that its estimates order
// layouts as the simulator does.
#include <algorithm>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "parallel/cost_model.h"
#include "parallel/pair_grid.h"
#include "parallel/planner.h"
#include "parallel/rank_plan.h"
#include "parallel/report.h"
#include "parallel/simulate.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

using ::testing::HasSubstr;

constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kZigzag, Layout::kStriped, Layout::kBalanced};

std::string reason_of(const Choice& choice, const std::string& what) {
  for (const Rejected& one : choice.rejected) {
    if (one.what.find(what) == 0) return one.why;
  }
  return "not refused";
}

// Nodes of eight that compute slowly beside their links, with tiles.
Machine node() {
  Machine machine;
  machine.name = "node";
  machine.ranks_per_node = 8;
  machine.memory_bytes = 80'000'000'000;
  machine.flops = {5e13, 1e15};
  machine.memory_bandwidth = 3e12;
  machine.kernel_latency_s = 5e-6;
  machine.tile = TileSize{128, 128};
  machine.links.inside = {3e-6, 450e9, std::nullopt};
  machine.links.between = Link{6e-6, 50e9, 400e9};
  return machine;
}

// One long document among short ones.
Mask uneven_documents(std::int64_t seq) {
  std::vector<std::int64_t> bounds{0, seq / 3};
  while (bounds.back() < seq)
    bounds.push_back(std::min(seq, bounds.back() + seq / 32 + static_cast<std::int64_t>(bounds.size()) * 7));
  return Mask::documents(bounds, Mask::causal());
}

struct Case {
  std::string name;
  std::string strategy;
  MeshShape mesh;
  std::int64_t seq;
  Mask mask;
};

std::vector<Case> cases() {
  return {{"causal ring", "ring", mesh_of(1, 8, 1, 1), 16384, Mask::causal()},
          {"causal ring of two nodes", "ring", mesh_of(1, 16, 1, 1), 32768, Mask::causal()},
          {"causal hybrid", "hybrid", mesh_of(1, 4, 2, 1), 16384, Mask::causal()},
          {"causal grid", "grid", mesh_of(1, 4, 1, 1, 2), 16384, Mask::causal()},
          {"causal ring_q", "ring_q", mesh_of(1, 8, 1, 1), 16384, Mask::causal()},
          {"causal allgather", "allgather", mesh_of(1, 8, 1, 1), 16384, Mask::causal()},
          {"full ring", "ring", mesh_of(1, 8, 1, 1), 16384, Mask::full()},
          {"window ring", "ring", mesh_of(1, 8, 1, 1), 16384, Mask::window(1024, 0)},
          {"window fetch", "fetch", mesh_of(1, 8, 1, 1), 16384, Mask::window(1024, 0)},
          {"documents ring", "ring", mesh_of(1, 8, 1, 1), 16384, uneven_documents(16384)},
          {"documents fetch", "fetch", mesh_of(1, 8, 1, 1), 32768, uneven_documents(32768)},
          {"documents hybrid", "hybrid", mesh_of(1, 8, 2, 1), 32768, uneven_documents(32768)},
          {"prefix double ring", "double_ring", mesh_of(1, 8, 1, 1, 1, 2), 32768, Mask::prefix(8192)},
          {"global ring", "ring", mesh_of(1, 8, 1, 1), 16384, Mask::global(512, 512, 0)}};
}

PlanRequest request_of(const Case& one, const Machine& machine) {
  PlanRequest request;
  request.shape = {1, one.seq, one.seq, 32, 8, 128, 128, DType::kBF16};
  request.options.mask = one.mask;
  request.options.strategy = one.strategy;
  request.mesh = one.mesh;
  request.objective = Objective::kTime;
  request.machine = &machine;
  return request;
}

// Cells that are cut count as visible evenly.
TEST(PlannerLayouts, ThePictureOfAMaskHoldsItsPairs) {
  for (const std::int64_t seq : {1, 37, 150, 1000, 4096}) {
    for (const Mask& mask : {Mask::causal(), Mask::window(20, 5), uneven_documents(seq)}) {
      AttentionOptions options;
      options.mask = mask;
      const auto problem = make_problem(mesh_of(1, 8, 1, 1), {.seq_q = seq, .seq_kv = seq}, options);
      const PairGrid grid(*problem);
      double all = 0;
      for (int q = 0; q < 8; ++q) {
        for (int k = 0; k < 8; ++k) {
          const Positions queries = problem->part_rows(false, q), keys = problem->part_rows(true, k);
          const double pairs = PairGrid::pairs(grid.seen(grid.share(queries, false)), grid.share(keys, true));
          const double exact = area(make_tiles(problem->mask, queries, keys));
          EXPECT_NEAR(pairs, exact, seq <= 128 ? 1e-9 * exact : 0.01 * visible_pairs(problem->mask)) << mask.text() << seq;
          all += pairs;
        }
      }
      EXPECT_NEAR(all, visible_pairs(problem->mask), 1e-9 * all);
    }
  }
}

// By 5 % and more: what is nearer is left to the simulation.
TEST(PlannerLayouts, EstimatesOrderThemAsTheSimulatorDoes) {
  const Machine machine = node();
  for (const Case& one : cases()) {
    PlanRequest request = request_of(one, machine);
    std::vector<std::pair<double, double>> times;  // estimated, simulated
    for (const Layout layout : kLayouts) {
      request.options.layout = layout;
      const Plan plan = make_plan(one.mesh, request.shape, request.options);
      times.emplace_back(assess(request, one.mesh, one.strategy).time_s, simulated_time(plan, backward(plan), machine));
    }
    for (std::size_t i = 0; i < times.size(); ++i) {
      for (std::size_t j = 0; j < times.size(); ++j) {
        if (times[i].second > 0.95 * times[j].second) continue;
        EXPECT_LT(times[i].first, times[j].first)
            << one.name << ": " << name_of(kLayouts[i]) << " before " << name_of(kLayouts[j])
            << fmt::format(", {:.4g} and {:.4g} ms", times[i].second * 1e3, times[j].second * 1e3);
      }
    }
  }
}

// With a machine and without one; every time of the layouts that are told is the simulator's, or longer by far.
TEST(PlannerLayouts, CausalMasksAreSharedOutEvenly) {
  const Machine machine = node();
  PlanRequest request = request_of(cases()[0], machine);
  for (const Objective objective : {Objective::kTime, Objective::kBytes}) {
    request.objective = objective;
    request.machine = objective == Objective::kTime ? &machine : nullptr;
    const Choice choice = plan_attention(request);
    EXPECT_EQ(choice.chosen.text(), "ring on ring 8, layout zigzag");
    ASSERT_EQ(choice.layouts.size(), 4U);
    EXPECT_EQ(choice.layouts[0].layout, Layout::kZigzag);
    EXPECT_NEAR(choice.layouts[1].balance, 8.0 / 15, 0.01);  // contiguous: P / (2P - 1)
    ASSERT_TRUE(choice.runner_up.has_value());
    EXPECT_EQ(choice.runner_up->text(), "ring on ring 8, layout striped");
    EXPECT_THAT(choice.layout_reason,
                HasSubstr(objective == Objective::kTime ? "fastest: 2.0" : "most even work: balance 1.000"));
    EXPECT_THAT(reason_of(choice, "ring on ring 8, layout contiguous"), HasSubstr("balance 0.533"));
  }
}

// No layout is better: the one of fewest pieces is taken, which is contiguous.
TEST(PlannerLayouts, FullMasksStayWhole) {
  const Machine machine = node();
  for (const Objective objective : {Objective::kTime, Objective::kBytes}) {
    for (const MeshShape& mesh : {mesh_of(1, 8, 1, 1), mesh_of(1, 1, 8, 1), mesh_of(1, 4, 2, 1)}) {
      PlanRequest request = request_of({"", "auto", mesh, 16384, Mask::full()}, machine);
      request.objective = objective;
      const Choice choice = plan_attention(request);
      EXPECT_EQ(choice.chosen.layout, Layout::kContiguous) << choice.chosen.text();
      EXPECT_THAT(reason_of(choice, fmt::format("{} on {}, layout zigzag", choice.chosen.strategy, mesh.text())),
                  testing::AnyOf(HasSubstr("no better than contiguous"), "not refused"));
    }
  }
  // Causal masks neither, where every rank has all positions of some heads.
  EXPECT_EQ(plan_attention(request_of({"", "ulysses", mesh_of(1, 1, 8, 1), 16384, Mask::causal()}, machine)).chosen.layout,
            Layout::kContiguous);
}

TEST(PlannerLayouts, UnevenDocumentsAreBalanced) {
  const Machine machine = node();
  PlanRequest request = request_of({"", "auto", mesh_of(1, 8, 1, 1), 131072, uneven_documents(131072)}, machine);
  for (const Objective objective : {Objective::kTime, Objective::kBytes}) {
    request.objective = objective;
    request.options.strategy = objective == Objective::kTime ? "auto" : "ring";
    const Choice choice = plan_attention(request);
    EXPECT_EQ(choice.chosen.layout, Layout::kBalanced) << choice.chosen.text() << explain(choice);
    EXPECT_GT(choice.chosen.balance, 0.98);
  }
}

TEST(PlannerLayouts, WindowsStayBesideTheirKeys) {
  Machine machine = node();
  machine.links.inside.bandwidth = 10e9;  // bytes matter
  PlanRequest request = request_of({"", "auto", mesh_of(1, 8, 1, 1), 65536, Mask::window(4096, 0)}, machine);
  for (const Objective objective : {Objective::kTime, Objective::kBytes}) {
    request.objective = objective;
    const Choice choice = plan_attention(request);
    EXPECT_EQ(choice.chosen.layout, Layout::kContiguous) << choice.chosen.text();
    EXPECT_TRUE(choice.chosen.strategy == "halo" || choice.chosen.strategy == "fetch") << choice.chosen.text();
    EXPECT_THAT(choice.layout_reason, HasSubstr(objective == Objective::kTime ? "fastest" : "fewest bytes"));
  }
  // Blocks of layout balanced lie anywhere: not beside the keys that they see.
  EXPECT_THAT(reason_of(plan_attention(request), "strategy halo in layout balanced"), HasSubstr("beyond the neighbours"));
}

TEST(PlannerLayouts, OneThatIsGivenIsTheOnlyOne) {
  const Machine machine = node();
  PlanRequest request = request_of(cases()[0], machine);
  request.options.layout = Layout::kContiguous;
  request.fixed_layout = true;
  const Choice choice = plan_attention(request);
  EXPECT_EQ(choice.chosen.layout, Layout::kContiguous);
  EXPECT_EQ(choice.layouts.size(), 1U);
  EXPECT_EQ(choice.layout_reason, "it is given");
}

TEST(PlannerLayouts, AreToldInJsonAndText) {
  const Machine machine = node();
  const Choice choice = plan_attention(request_of(cases()[0], machine));
  const Json json = to_json(choice);
  EXPECT_EQ(json["layout_reason"], choice.layout_reason);
  ASSERT_EQ(json["layouts"].size(), 4U);
  for (const Json& one : json["layouts"]) {
    for (const char* key : {"layout", "bytes_per_rank", "balance", "in_step", "worked", "time_s", "simulated"})
      EXPECT_TRUE(one.contains(key)) << key;
    EXPECT_GE(one["time_s"], json["chosen"]["time_s"]);
  }
  EXPECT_EQ(json["runner_up"]["layout"], "striped");
  EXPECT_TRUE(json["chosen"].contains("in_step") && json["chosen"].contains("worked"));
  EXPECT_THAT(explain(choice), HasSubstr("layout    zigzag: fastest"));
}

// Whatever is asked for: the choice can be planned, and no layout of it is known to be faster.
RC_GTEST_PROP(PlannerLayouts, AnyRequestHasAChoice, ()) {
  Machine machine = node();
  if (*rc::gen::arbitrary<bool>()) machine.tile->clipped = true;
  if (*rc::gen::arbitrary<bool>()) machine.tile.reset();
  PlanRequest request;
  const std::int64_t kv_heads = *rc::gen::inRange(1, 5), seq = *rc::gen::element<std::int64_t>(0, 1, 5, 130, 999, 4096);
  const std::int64_t seq_q = *rc::gen::element(seq, seq, std::int64_t{1});
  request.shape = {
      *rc::gen::element<std::int64_t>(0, 1, 3), seq_q, seq, kv_heads * *rc::gen::inRange(1, 4), kv_heads, 16, 16, DType::kBF16};
  request.ranks = *rc::gen::element(1, 2, 6, 7, 16, 24, 300);
  request.options.mask = *rc::gen::element(Mask::full(), Mask::causal(), Mask::window(7, 2), Mask::window(100, 0));
  if (*rc::gen::inRange(0, 4) == 0) request.options.determinism = Determinism::kInvariant;
  request.objective = *rc::gen::element(Objective::kBytes, Objective::kTime);
  if (request.objective == Objective::kTime || *rc::gen::arbitrary<bool>()) request.machine = &machine;
  const Choice choice = plan_attention(request);
  RC_LOG() << explain(choice);
  AttentionOptions options = request.options;
  options.strategy = choice.chosen.strategy;
  options.layout = choice.chosen.layout;
  make_plan(choice.chosen.mesh, request.shape, options);
  RC_ASSERT(choice.layouts[0].text() == choice.chosen.text());
  RC_ASSERT(!choice.layout_reason.empty());
  for (const Candidate& one : choice.layouts) {
    RC_ASSERT(one.in_step > 0 && one.in_step <= 1 + 1e-9 && one.worked >= 1 - 1e-9 && one.balance > 0);
    if (request.objective == Objective::kTime && one.simulated == choice.chosen.simulated)
      RC_ASSERT(one.time_s >= choice.chosen.time_s / 1.021);
  }
}

// Zigzag's late queries see what the next rank of a window's ring has just begun with.
TEST(PlannerLayouts, RingsWaitForTheirSlowest) {
  const Machine machine = node();
  PlanRequest request = request_of({"", "ring", mesh_of(1, 8, 1, 1), 16384, Mask::window(1024, 0)}, machine);
  request.options.layout = Layout::kZigzag;
  EXPECT_LT(assess(request, request.mesh, "ring").in_step, 0.9);
  EXPECT_EQ(assess(request, request.mesh, "allgather").in_step, 1);
  request.options.layout = Layout::kContiguous;
  EXPECT_GT(assess(request, request.mesh, "ring").in_step, 0.99);
}

}  // namespace
}  // namespace dattn
