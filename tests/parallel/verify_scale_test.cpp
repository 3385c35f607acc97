// verify() on meshes of many ranks: some hundred in every run, thousands at a million positions with DATTN_SCALE=1, where
// the time that each proof takes is printed and bounded.
#include <chrono>
#include <cstdlib>

#include <gtest/gtest.h>

#include "parallel/strategy.h"
#include "parallel/verify.h"

namespace dattn {
namespace {

struct Scale {
  std::string strategy;
  std::array<int, 4> sizes;  // of ring_outer, ring, rows, ulysses
  std::int64_t positions;
  double seconds;  // a proof may take, forward or backward
  Mask mask = Mask::causal();
};

void PrintTo(const Scale& scale, std::ostream* out) { *out << scale.strategy; }

Plan plan_of(const Scale& scale) {
  MeshShape mesh;
  for (std::size_t i = 0; i < kSequenceAxes.size(); ++i) mesh.set(kSequenceAxes[i], scale.sizes[i]);
  AttentionOptions options;
  options.strategy = scale.strategy;
  options.mask = scale.mask;
  return make_plan(mesh, {1, scale.positions, scale.positions, 32, 8, 128, 128, DType::kBF16}, options);
}

double seconds_to_prove(const Plan& plan) {
  const auto start = std::chrono::steady_clock::now();
  const Verdict verdict = verify(plan);
  EXPECT_TRUE(verdict.ok()) << verdict.problems[0];
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class VerifyScale : public testing::TestWithParam<Scale> {};

TEST_P(VerifyScale, ProvesManyRanksInTime) {
  const Plan forward = plan_of(GetParam()), gradient = backward(forward);
  const double forward_s = seconds_to_prove(forward), backward_s = seconds_to_prove(gradient);
  RecordProperty("forward_s", std::to_string(forward_s));
  RecordProperty("backward_s", std::to_string(backward_s));
  std::printf("%s on %d ranks: forward %.2f s (%zu steps), backward %.2f s (%zu steps)\n", GetParam().strategy.c_str(),
              forward.problem->mesh.ranks(), forward_s, forward.steps.size(), backward_s, gradient.steps.size());
  EXPECT_LT(forward_s, GetParam().seconds);
  EXPECT_LT(backward_s, GetParam().seconds);
}

// However many ranks there are, a state that one attend forgets is found.
TEST_P(VerifyScale, FindsALostHop) {
  Plan plan = plan_of(GetParam());
  for (std::size_t i = plan.steps.size(); i-- > 0;) {
    Step& step = plan.steps[i];
    if (step.verb != Verb::kAttend || step.in.size() < 3) continue;
    step.in.pop_back();  // forgets the state so far
    const Verdict verdict = verify(plan);
    ASSERT_FALSE(verdict.ok());
    EXPECT_NE(verdict.problems[0].find("never"), std::string::npos) << verdict.problems[0];
    return;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Hundreds, VerifyScale,
    testing::Values(Scale{"ring", {1, 256, 1, 1}, 1 << 16, 10}, Scale{"ring_q", {1, 256, 1, 1}, 1 << 16, 10},
                    Scale{"double_ring", {16, 16, 1, 1}, 1 << 16, 10}, Scale{"grid", {1, 16, 4, 4}, 1 << 16, 10},
                    Scale{"halo", {1, 256, 1, 1}, 1 << 16, 10, Mask::window(100, 0)},
                    Scale{"fetch", {1, 64, 1, 4}, 1 << 16, 10, Mask::window(5000, 100)},
                    Scale{"grid_gather", {1, 16, 4, 4}, 1 << 16, 10}, Scale{"invariant", {1, 16, 1, 4}, 1 << 16, 10},
                    Scale{"tree", {1, 64, 1, 4}, 1 << 16, 10}, Scale{"allgather", {1, 64, 1, 4}, 1 << 16, 10}),
    [](const auto& scale) { return scale.param.strategy; });

std::vector<Scale> thousands() {
  if (std::getenv("DATTN_SCALE") == nullptr) return {};
  return {{"ring", {1, 4096, 1, 1}, 1 << 20, 60},       {"grid", {1, 32, 16, 8}, 1 << 20, 10},
          {"double_ring", {64, 64, 1, 1}, 1 << 20, 60}, {"hybrid", {1, 512, 1, 8}, 1 << 20, 60},
          {"ring_q", {1, 4096, 1, 1}, 1 << 20, 60},     {"fetch", {1, 512, 1, 8}, 1 << 20, 150, Mask::window(5000, 0)}};
}

INSTANTIATE_TEST_SUITE_P(Thousands, VerifyScale, testing::ValuesIn(thousands()),
                         [](const auto& scale) { return scale.param.strategy; });

}  // namespace
}  // namespace dattn
