// Overlap is real: plans run by the real runner on a slowed link, with kernels that sleep for as long as the machine's rate
// says, take the time that simulate() predicts, and the trace shows transfers under way while a kernel works. Computation
// and communication are both slept, so that a busy machine changes little; what it still changes is tried again.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "parallel/comm/decorators.h"
#include "parallel/comm/slowed.h"
#include "parallel/comm/thread.h"
#include "parallel/run.h"
#include "parallel/simulate.h"
#include "tests/parallel/plan_run.h"
#include "tests/parallel/small_machine.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kSeq = 64;
constexpr double kTolerance = 0.1;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Computes nothing; takes the time that the machine's rate gives to the tiles, and notes it in the trace.
class SleepingKernel : public AttentionKernel {
 public:
  SleepingKernel(const Machine& machine, std::shared_ptr<Trace> trace) : machine_(machine), trace_(std::move(trace)) {}
  std::string_view name() const override { return "sleeping"; }
  Support supports(const AttendTraits&) const override { return {}; }
  void attend(const AttendArgs& args) const override { sleep(args, Verb::kAttend, 2 * 32); }
  void attend_grad(const AttendGradArgs& args) const override { sleep(args, Verb::kAttendGrad, 2 * 5 * 16); }

 private:
  template <class Args>
  void sleep(const Args& args, Verb verb, double flops_of_pair) const {
    const auto heads = static_cast<double>(args.q.shape[2]);
    const double flops = static_cast<double>(area(args.tiles)) * heads * flops_of_pair;
    const auto end = Clock::now() + std::chrono::duration<double>(flops / machine_.attend_rate(verb, DType::kF32));
    const double begin_us = trace_->now_us();
    std::this_thread::sleep_until(std::chrono::time_point_cast<Clock::duration>(end));
    trace_->span("kernel", name_of(verb), begin_us, trace_->now_us());
  }

  const Machine& machine_;
  std::shared_ptr<Trace> trace_;
};

struct Measured {
  double seconds = 0;                  // of the slowest rank
  std::vector<nlohmann::json> traces;  // by rank
};

Measured measure(const Plan& plan, const Machine& machine) {
  const int ranks = plan.problem->mesh.ranks();
  Measured measured;
  std::vector<double> seconds(static_cast<std::size_t>(ranks));
  measured.traces.resize(static_cast<std::size_t>(ranks));
  run_thread_ranks(ranks, {}, [&](Communicator& world) {
    const auto rank = static_cast<std::size_t>(world.rank());
    const auto trace = std::make_shared<Trace>(world.rank());
    std::vector<int> all;
    for (int i = 0; i < ranks; ++i) all.push_back(i);
    const Link& link = machine.links.inside;
    const auto group = traced(slowed(world.split(all, "job"), {link.latency_s, link.bandwidth}), trace);
    const Mesh mesh(*group, plan.problem->mesh);
    const RankPlan mine = make_rank_plan(plan, world.rank());
    const SleepingKernel kernel(machine, trace);
    const PlanInputs inputs(plan, mine);
    Runner runner(plan, mine, mesh, kernel);
    world.barrier({});
    const auto begin = Clock::now();
    runner.run(inputs.views, {});
    seconds[rank] = seconds_since(begin);
    measured.traces[rank] = nlohmann::json::parse(fmt::format("[{}]", trace->json_events()));
  });
  measured.seconds = *std::max_element(seconds.begin(), seconds.end());
  return measured;
}

struct TracedSpan {
  double begin_ms = 0, end_ms = 0;
};

std::vector<TracedSpan> spans_of(const nlohmann::json& trace, const std::string& track) {
  int id = -1;
  std::vector<TracedSpan> spans;
  for (const auto& event : trace) {
    if (event["ph"] == "M" && event["name"] == "thread_name" && event["args"]["name"] == track) id = event["tid"];
    if (event["ph"] != "X" || event["tid"] != id) continue;
    const double begin = event["ts"].get<double>() / 1000;
    spans.push_back({begin, begin + event["dur"].get<double>() / 1000});
  }
  return spans;
}

double total_ms(const std::vector<TracedSpan>& spans) {
  double total = 0;
  for (const TracedSpan& span : spans) total += span.end_ms - span.begin_ms;
  return total;
}

double shared_ms(const std::vector<TracedSpan>& a, const std::vector<TracedSpan>& b) {
  double shared = 0;
  for (const TracedSpan& x : a) {
    for (const TracedSpan& y : b) shared += std::max(0.0, std::min(x.end_ms, y.end_ms) - std::max(x.begin_ms, y.begin_ms));
  }
  return shared;
}

// Measures up to twelve times, since other work may disturb, until the time is within 10 % of what is predicted.
Measured measure_near(const Plan& plan, const Machine& machine, double predicted_s) {
  Measured measured;
  for (int attempt = 0; attempt < 12; ++attempt) {
    measured = measure(plan, machine);
    if (std::abs(measured.seconds / predicted_s - 1) < kTolerance) break;
  }
  return measured;
}

// On `ranks` ranks a forward step of a ring takes attend_s, and to pass a block of kv on takes hop_s, latency included.
Machine slow_machine(int ranks, double attend_s, double hop_s) {
  const double rows = static_cast<double>(kSeq) / ranks, latency_s = 0.002;
  Machine machine = free_machine();
  machine.flops.fp32 = rows * rows * 4 * 2 * 32 / attend_s;
  machine.links.inside = {latency_s, rows * 4 * 32 * 4 / (hop_s - latency_s), std::nullopt};
  return machine;
}

TEST(OverlapTime, ALongComputationHidesTheLink) {
  const Plan plan = plan_of("ring", mesh_of(2), kSeq);
  const Machine machine = slow_machine(2, 0.060, 0.040);
  const double predicted = simulate(plan, machine).time_s;
  ASSERT_NEAR(predicted, 2 * 0.060, 1e-6);
  const Measured measured = measure_near(plan, machine, predicted);
  EXPECT_NEAR(measured.seconds / predicted, 1, kTolerance);
  for (const auto& trace : measured.traces) {
    const auto transfers = spans_of(trace, "comm ring"), kernels = spans_of(trace, "kernel"),
               waits = spans_of(trace, "exposed communication");
    ASSERT_EQ(transfers.size(), 1u);
    ASSERT_EQ(kernels.size(), 2u);
    EXPECT_GE(shared_ms(transfers, kernels), 0.95 * 60) << "under way while the first block is attended";
    EXPECT_LT(total_ms(waits), kTolerance * 1000 * predicted);
  }
}

TEST(OverlapTime, ASlowLinkLeavesItsOwnTime) {
  const Plan plan = plan_of("ring", mesh_of(2), kSeq);
  const Machine machine = slow_machine(2, 0.030, 0.100);
  const double predicted = simulate(plan, machine).time_s;
  ASSERT_NEAR(predicted, 0.100 + 0.030, 1e-6);
  const Measured measured = measure_near(plan, machine, predicted);
  EXPECT_NEAR(measured.seconds / predicted, 1, kTolerance);
  for (const auto& trace : measured.traces) {
    const auto transfers = spans_of(trace, "comm ring"), kernels = spans_of(trace, "kernel"),
               waits = spans_of(trace, "exposed communication");
    EXPECT_GE(shared_ms(transfers, kernels), 0.95 * 30);
    EXPECT_NEAR(total_ms(waits), 100 - 30, kTolerance * 1000 * predicted) << "what the first block does not hide";
  }
}

// Rings, all-to-alls and their gradients on more ranks than cores: sleeping ranks need none.
TEST(OverlapTime, PlansTakeTheTimeOfTheirCriticalPath) {
  for (const auto& [strategy, mesh] :
       {std::pair{"ring", mesh_of(4)}, std::pair{"ring_q", mesh_of(4)}, std::pair{"allgather", mesh_of(4)},
        std::pair{"ulysses", mesh_of(1, 4)}, std::pair{"hybrid", mesh_of(2, 2)}}) {
    for (const double hop_s : {0.010, 0.040}) {
      const Machine machine = slow_machine(4, 0.020, hop_s);
      const Plan forward = plan_of(strategy, mesh, kSeq), gradient = backward(forward);
      for (const Plan* plan : {&forward, &gradient}) {
        const double predicted = simulate(*plan, machine).time_s;
        EXPECT_NEAR(measure_near(*plan, machine, predicted).seconds / predicted, 1, kTolerance)
            << strategy << (plan == &forward ? " forward" : " backward") << ", hop " << hop_s << " s";
      }
    }
  }
}

}  // namespace
}  // namespace dattn
