// Simulated times against times computed by hand, and what must hold of all of them.
#include "parallel/simulate.h"

#include <chrono>

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/rank_plan.h"
#include "tests/parallel/small_machine.h"

namespace dattn {
namespace {

constexpr double kRowFlops = 4 * 2 * (16 + 16);  // of one pair, all heads
constexpr double kRowBytes = 4 * (16 + 16) * 4;  // of one row of kv

TEST(Simulate, OneRankTakesItsFlopsAtTheKernelsRate) {
  Machine machine = free_machine();
  machine.flops.fp32 = 1e6;
  machine.attend_of_peak = 0.5;
  machine.kernel_latency_s = 3;
  const Simulation simulation = simulate(plan_of("ring", mesh_of(1), 10), machine);
  EXPECT_DOUBLE_EQ(simulation.time_s, 100 * kRowFlops / 0.5e6 + 3);  // finish of fp32 does nothing
  EXPECT_DOUBLE_EQ(simulation.ranks[0].flops, 100 * kRowFlops);
  EXPECT_EQ(simulation.ranks[0].exposed_s, 0);
}

TEST(Simulate, PartlyVisibleTilesCostWholeOnes) {
  Machine machine = free_machine();
  machine.flops.fp32 = 1;
  machine.tile = TileSize{4, 4};
  const Plan plan = plan_of("ring", mesh_of(1), 8, Mask::causal());
  EXPECT_NEAR(simulate(plan, machine).time_s, 3 * 16 * kRowFlops, 1e-6);
  machine.tile.reset();
  EXPECT_NEAR(simulate(plan, machine).time_s, 36 * kRowFlops, 1e-6);
}

// One query against many keys: what counts is reading them. q and out of one row, lse, and kv.
TEST(Simulate, ShortQueriesAreBoundByMemory) {
  Machine machine = free_machine();
  machine.memory_bandwidth = 1;
  AttentionOptions options;
  options.mask = Mask::full();
  const Plan plan = make_plan(mesh_of(1), {1, 1, 1000, 4, 4, 16, 16, DType::kF32}, options);
  EXPECT_DOUBLE_EQ(simulate(plan, machine).time_s, 1000 * kRowBytes + 4 * 16 * 4 + 4 * (16 + 1) * 4);
}

TEST(Simulate, FreeLinksLeaveTheComputation) {
  Machine machine = free_machine();
  machine.flops.fp32 = 1;
  const Simulation simulation = simulate(plan_of("ring", mesh_of(2), 16), machine);
  EXPECT_NEAR(simulation.time_s, 2 * 64 * kRowFlops, 1e-6);
  EXPECT_NEAR(simulation.most(&RankTimes::exposed_s), 0, 1e-6);
}

TEST(Simulate, SlowLinksLeaveTheHops) {
  const int ranks = 5;
  Machine machine = free_machine();
  machine.flops.fp32 = 1e6;
  machine.links.inside = {0.25, 8 * kRowBytes, std::nullopt};  // a block of 8 rows takes one second
  const Simulation simulation = simulate(plan_of("ring", mesh_of(ranks), 8 * ranks), machine);
  const double attend = 64 * kRowFlops / 1e6;
  ASSERT_LT(attend, 1);
  EXPECT_NEAR(simulation.time_s, (ranks - 1) * 1.25 + attend, 1e-9);
  EXPECT_NEAR(simulation.ranks[2].exposed_s, (ranks - 1) * (1.25 - attend), 1e-9);
}

TEST(Simulate, LongComputationsHideTheHops) {
  const int ranks = 5;
  Machine machine = free_machine();
  machine.flops.fp32 = 64 * kRowFlops / 3;  // an attend takes three seconds, a hop one
  machine.links.inside.bandwidth = 8 * kRowBytes;
  const Simulation simulation = simulate(plan_of("ring", mesh_of(ranks), 8 * ranks), machine);
  EXPECT_NEAR(simulation.time_s, ranks * 3, 1e-9);
  EXPECT_NEAR(simulation.most(&RankTimes::exposed_s), 0, 1e-9);
}

// Messages to several peers share the way out, and latencies overlap.
TEST(Simulate, AGatherGoesInRounds) {
  Machine machine = free_machine();
  machine.links.inside = {0.5, 8 * kRowBytes, std::nullopt};
  EXPECT_NEAR(simulate(plan_of("allgather", mesh_of(4), 32), machine).time_s, 3 * 1 + 0.5, 1e-9);
}

// Ranks hold 2, 2 and 1 rows. In the second round rank 2 is free to send from 1 s on, but rank 1 receives until 2 s.
TEST(Simulate, AWayInTakesOneMessageAtATime) {
  Machine machine = free_machine();
  machine.links.inside.bandwidth = kRowBytes;
  AttentionOptions options;
  options.strategy = "allgather";
  options.layout = Layout::kContiguous;
  const Plan plan = make_plan(mesh_of(3), {1, 5, 5, 4, 4, 16, 16, DType::kF32}, options);
  int found = 0;
  for (const Span& span : simulate(plan, machine, 3).spans) {
    if (span.rank != 1 || span.peer != 2) continue;
    ++found;
    EXPECT_NEAR(span.begin_s, 2, 1e-9);
    EXPECT_NEAR(span.seconds, 1, 1e-9);
  }
  EXPECT_EQ(found, 1);
}

TEST(Simulate, CopiesTakeMemoryBandwidth) {
  Machine machine = free_machine();
  machine.memory_bandwidth = 1;
  const Plan plan = plan_of("allgather", mesh_of(2), 16);
  const double attend = 16 * kRowBytes + 8 * 4 * 16 * 4 + 8 * 4 * (16 + 1) * 4;
  EXPECT_DOUBLE_EQ(simulate(plan, machine).time_s, 2 * 8 * kRowBytes + 2 * 16 * kRowBytes + attend);  // out: own; in: both
}

// Ranks 0, 1 on node 0 and 2, 3 on node 1: in a ring over all, rank 1 receives inside and rank 0 from the other node.
TEST(Simulate, LinkClassesFollowTheNodes) {
  const Simulation simulation = simulate(plan_of("ring", mesh_of(4), 32), free_machine(2));
  for (int rank = 0; rank < 4; ++rank) {
    const RankTimes& times = simulation.ranks[static_cast<std::size_t>(rank)];
    const auto bytes = static_cast<std::int64_t>(3 * 8 * kRowBytes);
    EXPECT_EQ(times.bytes_inside, rank % 2 == 1 ? bytes : 0);
    EXPECT_EQ(times.bytes_between, rank % 2 == 1 ? 0 : bytes);
  }
}

// Rank 0's way in: from ulysses' other rank q, k, v and out with lse, then a block of kv over the ring.
TEST(Simulate, BytesAndLinksByAxis) {
  Machine machine = free_machine();
  machine.links.inside = {0.5, 1000, std::nullopt};
  const Simulation simulation = simulate(plan_of("hybrid", mesh_of(3, 2), 48), machine);
  const std::vector<AxisUse> axes = simulation.axes();
  ASSERT_EQ(axes.size(), 2U);
  EXPECT_EQ(axes[0].axis, Axis::kRing);
  EXPECT_EQ(axes[1].axis, Axis::kUlysses);
  const double row = 2 * 16 * 4;                               // of one tensor, half of the heads
  EXPECT_DOUBLE_EQ(axes[0].bytes, 2 * 16 * 2 * row);           // two hops of k and v of 16 rows
  EXPECT_DOUBLE_EQ(axes[1].bytes, 8 * 4 * row + 8 * 2 * 4.0);  // 8 rows of q, k, v and out, and lse of two heads
  for (const AxisUse& use : axes) {
    EXPECT_NEAR(use.busiest_s, use.bytes / 1000, 1e-9);  // latencies hold no link
    EXPECT_LT(use.busiest_s, simulation.time_s);
  }
}

// Under a causal mask the last of contiguous ranks fetches all other blocks, a mean one half of them.
TEST(Simulate, TheBusiestLinkIsToldWithItsBytes) {
  Machine machine = free_machine();
  machine.links.inside = {0, 1000, std::nullopt};
  AttentionOptions options;
  options.strategy = "fetch";
  options.layout = Layout::kContiguous;
  const std::vector<AxisUse> axes =
      simulate(make_plan(mesh_of(4), {1, 32, 32, 4, 4, 16, 16, DType::kF32}, options), machine).axes();
  ASSERT_EQ(axes.size(), 1U);
  EXPECT_DOUBLE_EQ(axes[0].bytes, 1.5 * 8 * kRowBytes);
  EXPECT_EQ(axes[0].busiest_bytes, static_cast<std::int64_t>(3 * 8 * kRowBytes));
  EXPECT_NEAR(axes[0].busiest_s, 3 * 8 * kRowBytes / 1000, 1e-9);
}

// Both ranks of a node rotate to the other node at once.
TEST(Simulate, RanksOfANodeShareItsBandwidth) {
  Machine machine = free_machine(2);
  const Plan plan = plan_of("hybrid", mesh_of(2, 2), 32);
  const double block = 16 * kRowBytes / 2;  // half of the rows, half of the heads
  machine.links.between = Link{0, block, std::nullopt};
  EXPECT_NEAR(simulate(plan, machine).time_s, 1, 1e-9);
  machine.links.between->node_bandwidth = block;
  EXPECT_NEAR(simulate(plan, machine).time_s, 2, 1e-9);
  machine.links.between->node_bandwidth = 2 * block;
  EXPECT_NEAR(simulate(plan, machine).time_s, 1, 1e-9);
}

std::vector<Plan> plans() {
  std::vector<Plan> all;
  for (const auto& [strategy, mesh] : {std::pair{"ring", mesh_of(4)}, std::pair{"allgather", mesh_of(4)},
                                       std::pair{"ulysses", mesh_of(1, 4)}, std::pair{"hybrid", mesh_of(2, 4)}}) {
    all.push_back(plan_of(strategy, mesh, 101, Mask::causal()));
    all.push_back(backward(all.back()));
  }
  return all;
}

Machine some_machine() {
  Machine machine = free_machine(2);
  machine.flops.fp32 = 1e9;
  machine.memory_bandwidth = 1e9;
  machine.links.inside = {1e-6, 1e8, std::nullopt};
  machine.links.between = Link{3e-6, 2e7, 3e7};
  return machine;
}

TEST(Simulate, BytesFlopsAndMemoryAreThePlans) {
  for (const Plan& plan : plans()) {
    const Simulation simulation = simulate(plan, some_machine());
    for (int rank = 0; rank < plan.problem->mesh.ranks(); ++rank) {
      const RankPlan mine = make_rank_plan(plan, rank);
      const RankTimes& times = simulation.ranks[static_cast<std::size_t>(rank)];
      std::int64_t inputs = 0;
      for (const ValueId value : plan.inputs) inputs += bytes_of(plan, value, mine.blocks[static_cast<std::size_t>(value)]);
      EXPECT_EQ(times.bytes_inside + times.bytes_between, mine.cost.bytes_received + mine.cost.stats_bytes);
      std::int64_t over_axes = 0;
      for (const AxisTimes& axis : times.axes) over_axes += axis.bytes;
      EXPECT_EQ(over_axes, times.bytes_inside + times.bytes_between);
      EXPECT_EQ(times.flops, mine.flops());
      EXPECT_EQ(times.peak_memory, mine.cost.peak_memory + inputs);
      EXPECT_NEAR(times.end_s, times.compute_s + times.exposed_s, 1e-9);
      EXPECT_LE(times.end_s, simulation.time_s);
    }
  }
}

TEST(Simulate, MoreOfAnythingIsNeverSlower) {
  for (const Plan& plan : plans()) {
    const double time = simulate(plan, some_machine()).time_s;
    const auto with = [&](const auto& change) {
      Machine machine = some_machine();
      change(machine);
      return simulate(plan, machine).time_s;
    };
    EXPECT_LE(with([](Machine& m) { m.flops.fp32 *= 2; }), time) << plan.strategy;
    EXPECT_LE(with([](Machine& m) { m.links.inside.bandwidth *= 2; }), time) << plan.strategy;
    EXPECT_LE(with([](Machine& m) { m.links.between->bandwidth *= 2; }), time) << plan.strategy;
    EXPECT_LE(with([](Machine& m) { m.links.between->node_bandwidth.reset(); }), time) << plan.strategy;
    EXPECT_LE(with([](Machine& m) { m.links.between->latency_s = 0; }), time) << plan.strategy;
    EXPECT_LE(with([](Machine& m) { m.memory_bandwidth *= 2; }), time) << plan.strategy;
    EXPECT_EQ(with([](Machine&) {}), time);
  }
}

TEST(Simulate, ManyRanksTakeSeconds) {
  const int ranks = 256;
  Machine machine = free_machine(8);
  machine.links.between = Link{0, 2 * kRowBytes, std::nullopt};  // a hop between nodes takes a second
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_NEAR(simulate(plan_of("ring", mesh_of(ranks), 2 * ranks), machine).time_s, ranks - 1, 1e-6);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 20);
}

TEST(Simulate, RefusesWhatTheMachineLacks) {
  Machine machine = free_machine(2);
  machine.links.between.reset();
  EXPECT_NO_THROW(simulate(plan_of("ring", mesh_of(2), 8), machine));
  EXPECT_THROW(simulate(plan_of("ring", mesh_of(3), 8), machine), Error);
  const Plan fp64 = make_plan(mesh_of(1), {1, 8, 8, 4, 4, 16, 16, DType::kF64}, AttentionOptions{});
  EXPECT_THROW(simulate(fp64, machine), Error);
}

}  // namespace
}  // namespace dattn
