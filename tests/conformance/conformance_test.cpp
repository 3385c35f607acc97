// Runs the sweep on ranks as threads. DATTN_SWEEP=full takes every combination instead of a pairwise choice.
#include <cstdlib>
#include <mutex>
#include <string_view>

#include <gtest/gtest.h>

#include "parallel/comm/thread.h"
#include "parallel/strategy.h"
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
    for (const int ranks : {1, 2, 3, 4, 6, 8}) all.push_back({std::string(strategy.name), ranks});
  }
  return all;
}

bool full_sweep() {
  const char* value = std::getenv("DATTN_SWEEP");
  return value != nullptr && std::string_view(value) == "full";
}

class Conformance : public testing::TestWithParam<Group> {};

void run_cases(const std::vector<Case>& cases, int ranks) {
  for (const Case& one : cases) {
    std::mutex mutex;
    std::string problems;
    run_thread_ranks(ranks, {}, [&](Communicator& world) {
      const std::string mine = run_case(one, world);
      const std::lock_guard lock(mutex);
      problems += mine;
    });
    EXPECT_TRUE(problems.empty()) << problems;
  }
  testing::Test::RecordProperty("cases", static_cast<int>(cases.size()));
}

TEST_P(Conformance, EqualsTheReference) {
  const std::vector<Case> cases = sweep(GetParam().strategy, GetParam().ranks, full_sweep());
  ASSERT_FALSE(cases.empty());
  run_cases(cases, GetParam().ranks);
}

// 200 random cases by default, 2,000 in the full sweep.
TEST(ConformanceRandom, EqualsTheReference) {
  for (const int ranks : {1, 2, 3, 4, 5, 6, 7, 8})
    run_cases(random_cases(ranks, full_sweep() ? 250 : 25, 20261124 + static_cast<std::uint64_t>(ranks)), ranks);
}

INSTANTIATE_TEST_SUITE_P(Sweep, Conformance, testing::ValuesIn(groups()), [](const auto& group) {
  return group.param.strategy + "_" + std::to_string(group.param.ranks) + "_ranks";
});

}  // namespace
}  // namespace dattn::conformance
