// The planner: its costs against those of plans, what it chooses, and what it says about the rest.
#include "parallel/planner.h"

#include <algorithm>
#include <chrono>
#include <iostream>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "parallel/cost_model.h"
#include "parallel/lower_bound.h"
#include "parallel/rank_plan.h"
#include "parallel/simulate.h"
#include "parallel/verify.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

using ::testing::HasSubstr;

PlanRequest request_of(std::int64_t heads, std::int64_t kv_heads, int ranks, const Mask& mask = Mask::causal()) {
  PlanRequest request;
  request.shape = {1, 131072, 131072, heads, kv_heads, 128, 128, DType::kBF16};
  request.options.mask = mask;
  request.ranks = ranks;
  return request;
}

// Nodes of eight, as an H100 cluster's but in round numbers.
Machine cluster() {
  Machine machine;
  machine.ranks_per_node = 8;
  machine.memory_bytes = 80'000'000'000;
  machine.flops = {5e13, 1e15};
  machine.memory_bandwidth = 3e12;
  machine.kernel_latency_s = 5e-6;
  machine.links.inside = {3e-6, 450e9, std::nullopt};
  machine.links.between = Link{6e-6, 50e9, 400e9};
  return machine;
}

std::string refusal(const PlanRequest& request) {
  try {
    plan_attention(request);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    return error.what();
  }
  return "accepted";
}

// Why the first candidate or strategy whose text begins so was refused.
std::string reason_of(const Choice& choice, const std::string& what) {
  for (const Rejected& one : choice.rejected) {
    if (one.what.find(what) == 0) return one.why;
  }
  return "not refused";
}

struct Means {
  double forward = 0, backward = 0, balance = 0;
};

Means exact(const Plan& plan) {
  Means means;
  const Plan gradient = backward(plan);
  const int ranks = plan.problem->mesh.ranks();
  double flops = 0, most = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    const RankPlan mine = make_rank_plan(plan, rank);
    means.forward += static_cast<double>(mine.cost.bytes_received) / ranks;
    means.backward += static_cast<double>(make_rank_plan(gradient, rank).cost.bytes_received) / ranks;
    flops += mine.flops() / ranks;
    most = std::max(most, mine.flops());
  }
  means.balance = most > 0 ? flops / most : 1;
  return means;
}

RC_GTEST_PROP(Planner, ClosedFormsAreTheMeansOfPlans, ()) {
  const std::int64_t group = *rc::gen::inRange(1, 4), kv_heads = *rc::gen::inRange(1, 5);
  const int tensor = kv_heads % 2 == 0 ? *rc::gen::element(1, 2) : 1;
  const MeshShape mesh = mesh_of(1, *rc::gen::inRange(1, 6), *rc::gen::element(1, 1, 2, 3), tensor, *rc::gen::element(1, 1, 2),
                                 *rc::gen::element(1, 1, 2));
  const std::int64_t unit = 2 * mesh.sequence_parts();
  const std::int64_t seq_q = unit * *rc::gen::inRange(1, 5);
  const bool crosses = *rc::gen::arbitrary<bool>();
  AttentionShape shape{2, seq_q, crosses ? unit * *rc::gen::inRange(1, 5) : seq_q, group * kv_heads, kv_heads,
                       8, 16,    *rc::gen::element(DType::kF32, DType::kBF16)};
  PlanRequest request;
  if (*rc::gen::inRange(0, 3) == 0) shape.bias = BiasShape{*rc::gen::arbitrary<bool>(), *rc::gen::arbitrary<bool>()};
  request.shape = shape;
  request.mesh = mesh;
  request.options.mask = *rc::gen::element(Mask::full(), Mask::causal(), Mask::window(7, 2));
  request.options.layout = *rc::gen::element(Layout::kZigzag, Layout::kContiguous, Layout::kStriped, Layout::kBalanced);
  for (const Strategy& strategy : strategies()) {
    const bool invariant = strategy.name == "invariant";
    request.options.determinism = invariant ? Determinism::kInvariant : Determinism::kRepeatable;
    const auto problem = make_problem(mesh, shape, request.options);
    if (!(strategy.automatic || invariant) || !strategy.accepts(*problem).ok) continue;
    RC_LOG() << strategy.name << " on " << mesh.text() << " mask " << problem->mask_text << " layout "
             << name_of(request.options.layout) << "\n";
    const Means means = exact(write_plan(strategy, problem));
    const Candidate candidate = assess(request, mesh, std::string(strategy.name));
    if (request.options.layout != Layout::kBalanced) {  // whose blocks need not divide
      RC_ASSERT(std::abs(candidate.forward_bytes - means.forward) <= 1e-9 * means.forward);
      RC_ASSERT(std::abs(candidate.backward_bytes - means.backward) <= 1e-9 * means.backward);
    }
    if (invariant) continue;  // whose work is that of other rows backward than forward
    // Heads and rows need not have their slowest rank together, and KV heads are not work.
    RC_ASSERT(candidate.balance <= means.balance + 1e-9);
    if (shape.heads % (mesh.size(Axis::kUlysses) * tensor) == 0) RC_ASSERT(std::abs(candidate.balance - means.balance) < 1e-9);
  }
}

TEST(Planner, StaysNearTheLowerBound) {
  for (const auto& [heads, kv_heads] : {std::pair{32, 8}, {32, 32}, {64, 8}, {40, 8}, {48, 4}}) {
    for (int ranks = 8; ranks <= 512; ranks *= 2) {
      for (const Mask& mask : {Mask::causal(), Mask::full()}) {
        const Choice choice = plan_attention(request_of(heads, kv_heads, ranks, mask));
        SCOPED_TRACE(fmt::format("H {} K {} P {}: {}", heads, kv_heads, ranks, choice.chosen.text()));
        EXPECT_LE(choice.ratio, 1.12);
        EXPECT_GE(choice.ratio, 1.0 - 1e-9);
        EXPECT_GE(choice.chosen.balance, 0.5);
        EXPECT_EQ(choice.chosen.mesh.ranks(), ranks);
        ASSERT_TRUE(choice.runner_up.has_value());
        EXPECT_NE(choice.runner_up->mesh, choice.chosen.mesh);
      }
    }
  }
}

TEST(Planner, ReferencePoints) {
  const double unit = 131072.0 * 128 * 2;
  for (const auto& [ranks, bytes] : {std::pair{8, 8.75}, {64, 2.84}, {256, 1.46}, {512, 0.98}}) {
    EXPECT_NEAR(plan_attention(request_of(32, 8, ranks)).chosen.forward_bytes / unit, bytes, 0.006) << ranks;
  }
}

TEST(Planner, PlansThousandsOfRanksAtOnce) {
  const Machine machine = cluster();
  const Mask documents = Mask::documents({0, 1000, 30000, 31000, 90000, 100000, 131072}, Mask::causal());
  for (const Mask& mask : {Mask::causal(), Mask::full(), Mask::window(1024, 0), Mask::global(16, 512, 0), documents}) {
    for (const Objective objective : {Objective::kBytes, Objective::kTime}) {
      PlanRequest request = request_of(32, 8, 4096, mask);
      request.objective = objective;
      request.machine = &machine;
      const auto start = std::chrono::steady_clock::now();
      const Choice choice = plan_attention(request);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      std::cout << fmt::format("4096 ranks, {}, {}: {:.1f} ms, {}\n", mask.text(),
                               objective == Objective::kTime ? "time" : "bytes", seconds * 1e3, choice.chosen.text());
      EXPECT_LT(seconds, 0.5);  // 50 ms on an idle machine
      EXPECT_EQ(choice.chosen.mesh.ranks(), 4096);
    }
  }
}

// On so many ranks by time, layouts that move more than the best are not compared, but they are told.
TEST(Planner, TellsEveryLayoutOfAStrategyThatFetches) {
  const Machine machine = cluster();
  PlanRequest request = request_of(32, 8, 512, Mask::window(8192, 0));
  request.objective = Objective::kTime;
  request.machine = &machine;
  const Choice choice = plan_attention(request);
  EXPECT_EQ(choice.chosen.strategy, "fetch");
  EXPECT_EQ(choice.layouts.size(), 4u);
}

TEST(Planner, PlansABillionPositions) {
  PlanRequest request = request_of(32, 8, 64, Mask::window(1 << 20, 0));
  request.shape.seq_q = request.shape.seq_kv = 1'000'000'000;
  EXPECT_NE(plan_attention(request).chosen.layout, Layout::kStriped);
  request.shape.batch = 20;  // more pairs than 64 bits count
  request.options.mask = Mask::full();
  for (const Layout layout : {Layout::kZigzag, Layout::kBalanced}) {
    request.options.layout = layout;
    request.fixed_layout = true;
    const Candidate chosen = plan_attention(request).chosen;
    EXPECT_NEAR(chosen.balance, 1, 1e-6) << chosen.text();
    request.options.strategy = chosen.strategy;
    EXPECT_DOUBLE_EQ(verify(make_plan(chosen.mesh, request.shape, request.options)).pairs, 20e18);
    request.options.strategy = "auto";
  }
}

TEST(Planner, SaysWhyNot) {
  PlanRequest request = request_of(32, 8, 64);
  const Choice choice = plan_attention(request);
  // As many forward bytes as hybrid on ring 8 x ulysses 8, fewer backward.
  EXPECT_EQ(choice.chosen.text(), "grid on ring 4 x rows 2 x ulysses 8, layout zigzag");
  ASSERT_FALSE(choice.rejected.empty());
  EXPECT_EQ(choice.rejected[0].what, "ulysses 64");
  EXPECT_THAT(choice.rejected[0].why, HasSubstr("only 32 query heads"));

  request.memory_bytes = choice.chosen.peak_memory - 1;
  const Choice smaller = plan_attention(request);
  EXPECT_LE(smaller.chosen.peak_memory, request.memory_bytes);
  EXPECT_NE(smaller.chosen.text(), choice.chosen.text());
  const auto told = [&](const Rejected& one) { return one.what == choice.chosen.text(); };
  EXPECT_EQ(std::count_if(smaller.rejected.begin(), smaller.rejected.end(), told), 1);
  request.memory_bytes = 1;
  EXPECT_THAT(refusal(request), HasSubstr(fmt::format("needs {} bytes of memory, a rank has 1", choice.chosen.peak_memory)));
}

// Fetch holds most where the mask shows most: on the last rank of a contiguous causal one.
TEST(Planner, MemoryIsThatOfTheRankThatHoldsMost) {
  PlanRequest request = request_of(32, 8, 0);
  request.ranks.reset();
  request.mesh = mesh_of(1, 8, 1, 1);
  request.options.strategy = "fetch";
  request.options.layout = Layout::kContiguous;
  request.fixed_layout = true;
  const Candidate chosen = plan_attention(request).chosen;
  const Plan gradient = backward(make_plan(request.mesh, request.shape, request.options));
  EXPECT_EQ(chosen.peak_memory, memory_with_inputs(gradient, make_rank_plan(gradient, 7)));
  EXPECT_GT(chosen.peak_memory, memory_with_inputs(gradient, make_rank_plan(gradient, 0)));
  request.memory_bytes = chosen.peak_memory - 1;
  EXPECT_THAT(refusal(request), HasSubstr(fmt::format("needs {} bytes of memory", chosen.peak_memory)));
}

TEST(Planner, RefusesWhatItCannotPlan) {
  PlanRequest request = request_of(32, 8, 6);
  request.mesh.set(Axis::kTensor, 4);
  EXPECT_THAT(refusal(request), HasSubstr("mesh.ranks 6 is no multiple of data 1 x tensor 4; use one, for example 8"));
  request = request_of(32, 8, 16);
  request.objective = Objective::kTime;
  EXPECT_THAT(refusal(request), HasSubstr("give machine: FILE"));
  Machine node = cluster();
  node.links.between.reset();
  request.machine = &node;
  EXPECT_THAT(refusal(request), HasSubstr("one node of 8"));
  request = request_of(32, 8, 16);
  request.options.strategy = "rings";
  EXPECT_THAT(refusal(request), HasSubstr("unknown strategy 'rings'"));
}

// Strides of a long sequence have gaps between the keys of narrow windows, which fetch takes along: then the ring moves no
// more.
TEST(Planner, TriesWhatElseFitsAFixedLayout) {
  PlanRequest request = request_of(32, 8, 8);
  request.shape.seq_q = request.shape.seq_kv = 32 * kMostSeenRanges;
  request.options.mask = Mask::window(3, 0);
  request.options.layout = Layout::kStriped;
  request.fixed_layout = true;
  request.ranks.reset();
  request.mesh.set(Axis::kRing, 8);
  const Choice choice = plan_attention(request);
  EXPECT_EQ(choice.chosen.text(), "ring on ring 8, layout striped");
  EXPECT_THAT(reason_of(choice, "fetch"), HasSubstr("receives 100 % of the bytes"));
  request.options.strategy = "fetch";
  EXPECT_EQ(plan_attention(request).chosen.text(), "fetch on ring 8, layout striped");
}

TEST(Planner, KeepsWhatIsGiven) {
  PlanRequest request = request_of(32, 8, 64);
  request.mesh.set(Axis::kTensor, 2);
  request.mesh.set(Axis::kData, 4);
  request.options.strategy = "ring";
  request.options.layout = Layout::kStriped;
  request.fixed_layout = true;
  const Choice choice = plan_attention(request);
  EXPECT_EQ(choice.chosen.text(), "ring on data 4 x ring 8 x tensor 2, layout striped");
  EXPECT_FALSE(choice.runner_up.has_value());
}

// On a mesh that is given, full attention is for the plainest strategy that uses its axes, and the rest is refused with
// reasons.
TEST(Planner, TakesThePlainestOfEquals) {
  for (const MeshShape& mesh : {mesh_of(1, 8, 1, 1), mesh_of(1, 1, 8, 1), mesh_of(1, 4, 2, 1), mesh_of(1, 4, 1, 1, 2),
                                mesh_of(1, 2, 1, 1, 1, 4), mesh_of(1, 1, 1, 1)}) {
    for (const std::int64_t kv_heads : {8, 32}) {
      PlanRequest request = request_of(32, kv_heads, 0);
      request.ranks.reset();
      request.mesh = mesh;
      const Choice choice = plan_attention(request);
      EXPECT_EQ(choice.chosen.strategy, plainest_strategy(mesh)) << mesh.text();
      EXPECT_EQ(choice.chosen.mesh, mesh);
      EXPECT_NE(reason_of(choice, mesh.size(Axis::kRing) > 1 ? "strategy ulysses" : "strategy ring_q"), "");
    }
  }
}

// A call with strategy auto runs what the planner chooses for its mesh and layout, by bytes.
RC_GTEST_PROP(Planner, AutoRunsTheChoice, ()) {
  const MeshShape mesh = mesh_of(1, *rc::gen::inRange(1, 9), *rc::gen::element(1, 1, 2, 3), *rc::gen::element(1, 2),
                                 *rc::gen::element(1, 1, 2), *rc::gen::element(1, 1, 2));
  const std::int64_t kv_heads = *rc::gen::inRange(1, 5), seq_kv = *rc::gen::inRange<std::int64_t>(1, 700);
  PlanRequest request;
  request.mesh = mesh;
  request.fixed_layout = true;
  request.shape = {1,  *rc::gen::element<std::int64_t>(1, seq_kv),  seq_kv, kv_heads * *rc::gen::inRange(1, 4), kv_heads, 16,
                   16, *rc::gen::element(DType::kF32, DType::kBF16)};
  request.options.mask = *rc::gen::element(Mask::full(), Mask::causal(), Mask::window(9, 2), Mask::global(1, 5, 0, true));
  request.options.layout = *rc::gen::element(Layout::kZigzag, Layout::kContiguous, Layout::kStriped, Layout::kBalanced);
  const Choice choice = plan_attention(request);
  const Plan plan = make_plan(mesh, request.shape, request.options);
  RC_LOG() << choice.chosen.text() << "\n";
  RC_ASSERT(plan.strategy == choice.chosen.strategy);
  RC_ASSERT(plan.problem->layout == request.options.layout);
}

TEST(Planner, AutoFetchesWindowsAndKeepsKeysOfOneQuery) {
  AttentionOptions options;
  options.layout = Layout::kContiguous;
  options.mask = Mask::window(100, 0);
  EXPECT_THAT(make_plan(mesh_of(1, 8, 1, 1), {.seq_q = 4096, .seq_kv = 4096}, options).strategy,
              testing::AnyOf("fetch", "halo"));
  options.mask = Mask::full();
  EXPECT_EQ(make_plan(mesh_of(1, 8, 1, 1), {.seq_q = 1, .seq_kv = 4096, .dtype = DType::kBF16}, options).strategy, "tree");
  options.mask = Mask::causal();
  options.layout = Layout::kZigzag;
  EXPECT_EQ(make_plan(mesh_of(1, 8, 1, 1), {.seq_q = 4096, .seq_kv = 4096, .dtype = DType::kBF16}, options).strategy, "ring");
}

// What is not looked at is named too.
TEST(Planner, SaysWhatItDidNotTry) {
  const Choice choice = plan_attention(request_of(32, 8, 64));
  EXPECT_THAT(reason_of(choice, "strategy ring on "), HasSubstr("has no use for the 2 ranks of mesh.rows"));
  const auto more = std::find_if(choice.rejected.begin(), choice.rejected.end(),
                                 [](const Rejected& one) { return one.what.find("more candidates") != std::string::npos; });
  ASSERT_NE(more, choice.rejected.end());
  EXPECT_THAT(more->why, HasSubstr("the work of the best 32 was compared"));
  EXPECT_THAT(reason_of(choice, "grid on ring 4 x rows 2 x ulysses 8, layout contiguous"),
              HasSubstr("costs more: balance 0.533; zigzag has balance 1.000"));
  const Choice full = plan_attention(request_of(32, 8, 64, Mask::full()));
  EXPECT_THAT(reason_of(full, "strategies fetch and halo"), HasSubstr("hides nothing"));
  EXPECT_THAT(reason_of(full, "layout balanced"), HasSubstr("every layout shares it out evenly"));
}

TEST(Planner, FetchesWhereTheMaskHidesMost) {
  const Choice causal = plan_attention(request_of(32, 8, 64));
  bool told = false;
  for (const Rejected& one : causal.rejected) told = told || one.what.find("fetch") == 0;
  EXPECT_TRUE(told);
  const Choice window = plan_attention(request_of(32, 8, 64, Mask::window(1024, 0)));
  EXPECT_TRUE(window.chosen.strategy == "fetch" || window.chosen.strategy == "halo") << window.chosen.text();
  EXPECT_EQ(window.chosen.layout, Layout::kContiguous);
  EXPECT_LT(window.ratio, 0.1);
}

// Contiguous rows of a causal mask are uneven: the planner keeps away from them unless told to.
TEST(Planner, SharesOutTheWork) {
  PlanRequest request = request_of(32, 8, 64);
  EXPECT_GT(plan_attention(request).chosen.balance, 0.99);
  request.options.layout = Layout::kContiguous;
  request.fixed_layout = true;
  EXPECT_LT(plan_attention(request).chosen.balance, 0.7);
}

TEST(Planner, TimesAreSimulatedWhereThatIsQuick) {
  const Machine machine = cluster();
  PlanRequest request = request_of(32, 8, 16);
  request.objective = Objective::kTime;
  request.machine = &machine;
  const Choice choice = plan_attention(request);
  EXPECT_TRUE(choice.chosen.simulated);
  AttentionOptions options = request.options;
  options.strategy = choice.chosen.strategy;
  options.layout = choice.chosen.layout;
  const Plan plan = make_plan(choice.chosen.mesh, request.shape, options);
  EXPECT_DOUBLE_EQ(simulate(plan, machine).time_s + simulate(backward(plan), machine).time_s, choice.chosen.time_s);
  ASSERT_TRUE(choice.runner_up.has_value());
  if (choice.runner_up->simulated) {
    EXPECT_LE(choice.chosen.time_s, choice.runner_up->time_s);
  }
  const Candidate estimate = assess(request, choice.chosen.mesh, choice.chosen.strategy);
  EXPECT_FALSE(estimate.simulated);
  EXPECT_NEAR(estimate.time_s / choice.chosen.time_s, 1, 0.5);
  request.ranks = 512;
  EXPECT_FALSE(plan_attention(request).chosen.simulated);
}

}  // namespace
}  // namespace dattn
