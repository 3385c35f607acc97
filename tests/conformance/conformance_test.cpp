// Runs the sweep on ranks as threads. DATTN_SWEEP=full takes every combination instead of a pairwise choice.
#include <iostream>
#include <mutex>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/comm/thread.h"
#include "parallel/strategy.h"
#include "tests/conformance/random_call.h"
#include "tests/conformance/sweep.h"

namespace dattn::conformance {
namespace {

struct Group {
  std::string strategy;
  int ranks;
};

void PrintTo(const Group& group, std::ostream* out) { *out << group.strategy << " on " << group.ranks << " ranks"; }

std::vector<Group> groups() {
  std::vector<Group> all;
  for (const Strategy& strategy : strategies()) {
    for (const int ranks : {1, 2, 3, 4, 5, 6, 7, 8}) all.push_back({std::string(strategy.name), ranks});
  }
  return all;
}

class Conformance : public testing::TestWithParam<Group> {};

void run(const Case& one) {
  std::mutex mutex;
  std::string problems;
  run_thread_ranks(one.mesh.ranks(), {}, [&](Communicator& world) {
    std::string mine;
    run_on_device(test_devices(), world, 60, [&](Communicator& ranks) { mine = run_case(one, ranks); });
    const std::lock_guard lock(mutex);
    problems += mine;
  });
  EXPECT_TRUE(problems.empty()) << problems;
}

TEST_P(Conformance, EqualsTheReference) {
  const std::vector<Case> cases = sweep(GetParam().strategy, GetParam().ranks, full_sweep());
  ASSERT_FALSE(cases.empty());
  for (const Case& one : cases) run(one);
  RecordProperty("cases", static_cast<int>(cases.size()));
}

// The same random calls that planning is tested with, small enough to be compared with the reference: 200 by default, 2,000 in
// the full sweep. What a strategy refuses is drawn again.
TEST(ConformanceRandom, EqualsTheReference) {
  const std::size_t count = full_sweep() ? 2'000 : 200;
  const std::uint64_t seed = sweep_seed();
  RandomCalls calls(seed, {});
  std::size_t ran = 0, refused = 0;
  while (ran < count && refused < 10 * count) {
    const RandomCall call = calls.next();
    try {
      make_plan(call.mesh, call.shape, call.options);
    } catch (const Error&) {
      ++refused;
      continue;
    }
    const std::string name = fmt::format("random call {} of seed {}:\n{}", ran++, seed, call.yaml());
    run({call.options.strategy, call.mesh, call.options.layout, name, call.shape, "as above",
         std::make_shared<const AttentionOptions>(call.options)});
  }
  std::cout << fmt::format("seed {}: {} calls ran, {} were refused\n", seed, ran, refused);
  EXPECT_EQ(ran, count);
}

INSTANTIATE_TEST_SUITE_P(Sweep, Conformance, testing::ValuesIn(groups()), [](const auto& group) {
  return group.param.strategy + "_" + std::to_string(group.param.ranks) + "_ranks";
});

}  // namespace
}  // namespace dattn::conformance
