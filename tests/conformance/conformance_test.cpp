// Runs the sweep. DATTN_SWEEP=full takes every combination instead of a pairwise choice.
#include <iostream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/strategy.h"
#include "tests/conformance/random_call.h"
#include "tests/conformance/ranks.h"
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
    for (const int ranks : rank_counts()) all.push_back({std::string(strategy.name), ranks});
  }
  return all;
}

class Conformance : public testing::TestWithParam<Group> {};

void run(const Case& one) {
  run_ranks(one.mesh.ranks(), [&](Communicator& world) {
    const std::string problems = run_case(one, world);
    EXPECT_TRUE(problems.empty()) << problems;
  });
}

TEST_P(Conformance, EqualsTheReference) {
  const std::vector<Case> cases = sweep(GetParam().strategy, GetParam().ranks, full_sweep());
  ASSERT_FALSE(cases.empty());
  for (const Case& one : cases) run(one);
  RecordProperty("cases", static_cast<int>(cases.size()));
}

// What the reference, one product after the other, computes in a tenth of a second, on few ranks.
bool is_small(const RandomCall& call) {
  constexpr double kMostProducts = 0x1p25;
  const AttentionShape& s = call.shape;
  const double pairs = static_cast<double>(s.batch * s.heads) * static_cast<double>(s.seq_q) * static_cast<double>(s.seq_kv);
  return call.mesh.ranks() <= 8 && pairs * static_cast<double>(s.dim_qk + s.dim_v) <= kMostProducts;
}

// Of the random calls that planning is tested with those that are small enough to be compared with the reference: 200 by
// default, 2,000 in the full sweep. What is refused is drawn again. Fewer than 8 processes, whose devices may be slow
// stand-ins, take smaller calls, of as many ranks as they are.
TEST(ConformanceRandom, EqualsTheReference) {
  const std::size_t count = full_sweep() ? 2'000 : 200;
  const std::uint64_t seed = sweep_seed();
  const bool any = most_ranks() >= 8;
  RandomCalls calls(seed, any ? kAnyCalls : CallLimits{.ranks = most_ranks()});
  std::size_t ran = 0, shaped = 0, refused = 0, large = 0;
  while (ran < count && refused + large < 10 * count) {
    RandomCall call = calls.next();
    const std::string text = call.yaml();
    const bool shapes = call.planned && call.shape.dtype != DType::kF64;  // which configs lack
    try {
      if (shapes) call = read_call(text);
      make_plan(call.mesh, call.shape, call.options);
    } catch (const Error&) {
      ++refused;
      continue;
    }
    if (!is_small(call)) {
      ++large;
      continue;
    }
    shaped += shapes ? 1 : 0;
    const std::string name = fmt::format("random call {} of seed {}:\n{}", ran++, seed, text);
    run({call.options.strategy, call.mesh, call.options.layout, name, call.shape, "as above",
         std::make_shared<const AttentionOptions>(call.options)});
  }
  std::cout << fmt::format("seed {}: {} calls ran, {} of them on a mesh of the planner's; {} were refused, {} too large\n",
                           seed, ran, shaped, refused, large);
  EXPECT_EQ(ran, count);
  EXPECT_EQ(shaped > 0, any);
  RecordProperty("cases", static_cast<int>(ran));
}

INSTANTIATE_TEST_SUITE_P(Sweep, Conformance, testing::ValuesIn(groups()), [](const auto& group) {
  return group.param.strategy + "_" + std::to_string(group.param.ranks) + "_ranks";
});

}  // namespace
}  // namespace dattn::conformance
