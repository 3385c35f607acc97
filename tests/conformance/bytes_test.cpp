// The bytes of a plan are those that travel: random calls, forward and backward, on every rank, verb by verb.
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/comm/decorators.h"
#include "parallel/message.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/random_call.h"
#include "tests/conformance/ranks.h"
#include "tests/conformance/sweep.h"
#include "tests/parallel/plan_run.h"

namespace dattn::conformance {
namespace {

using Bytes = std::map<std::string, std::pair<std::int64_t, std::int64_t>>;  // received and sent, by verb

Bytes without_nothing(Bytes bytes) {
  std::erase_if(bytes, [](const auto& entry) { return entry.second == std::pair<std::int64_t, std::int64_t>{}; });
  return bytes;
}

Bytes planned(const Plan& plan, const RankPlan& mine) {
  Bytes bytes;
  for (const auto& [verb, received] : mine.cost.received_by_verb) bytes[verb].first = received;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (!is_move(step.verb)) continue;
    const What what = plan.values[static_cast<std::size_t>(step.out[0])].what;
    const auto fields = message_fields(step.verb, what, plan.problem->shape);
    for (const auto pieces : by_peer(mine.steps[i].sends)) {
      const bool stays = pieces[0].peer == plan.problem->mesh.coordinate(mine.rank, step.axis);
      if (!stays) bytes[std::string(name_of(step.verb))].second += message_bytes(fields, plan.problem->shape.batch, pieces);
    }
  }
  return without_nothing(std::move(bytes));
}

Bytes counted_by(const ByteCounter& counter) {
  Bytes bytes;
  for (const auto& [verb, counts] : counter.by_verb()) bytes[verb] = {counts.received, counts.sent};
  return without_nothing(std::move(bytes));
}

void expect_moved(const Plan& plan, const Mesh& mesh, ByteCounter& counter, const std::string& what) {
  const RankPlan mine = make_rank_plan(plan, mesh.rank());
  const PlanInputs inputs(plan, mine);
  const NoKernel kernel;
  counter.reset();
  Runner(plan, mine, mesh, kernel).run(inputs.views, {});
  EXPECT_EQ(counter.total().received, mine.cost.bytes_received + mine.cost.stats_bytes) << "rank " << mesh.rank() << what;
  EXPECT_EQ(counted_by(counter), planned(plan, mine)) << "rank " << mesh.rank() << what;
}

TEST(Bytes, OfFiveHundredRandomCallsAreThoseOfTheirPlans) {
  constexpr int kCalls = 500, kMostDraws = 20 * kCalls;
  const std::uint64_t seed = sweep_seed() + 500;
  RandomCalls calls(seed, {.ranks = most_ranks()});
  int ran = 0;
  for (int draw = 0; draw < kMostDraws && ran < kCalls; ++draw) {
    const RandomCall call = calls.next();
    if (call.mesh.ranks() == 1) continue;
    Plan forward;
    try {
      forward = make_plan(call.mesh, call.shape, call.options);
    } catch (const Error&) {
      continue;  // refused
    }
    ++ran;
    const Plan gradient = backward(forward);
    EXPECT_NO_THROW(require_proved(forward, "forward"); require_proved(gradient, "backward"));
    const std::string what = fmt::format(", draw {} of seed {}:\n{}", draw, seed, call.yaml());
    std::vector<int> everyone;
    for (int rank = 0; rank < call.mesh.ranks(); ++rank) everyone.push_back(rank);
    run_ranks(call.mesh.ranks(), [&](Communicator& world) {
      const auto counter = std::make_shared<ByteCounter>();
      const auto counting = counted(world.split(everyone, "bytes"), counter);
      const Mesh mesh(*counting, call.mesh);
      expect_moved(forward, mesh, *counter, what);
      expect_moved(gradient, mesh, *counter, what);
    });
  }
  EXPECT_EQ(ran, kCalls);
  RecordProperty("cases", ran);
}

}  // namespace
}  // namespace dattn::conformance
