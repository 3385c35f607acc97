// verify() proves good plans and finds every kind of broken one, naming rank and step.
#include "parallel/verify.h"

#include <algorithm>
#include <functional>

#include <gtest/gtest.h>

#include "parallel/strategy.h"

namespace dattn {
namespace {

Plan plan_of(const std::string& strategy, int ring, int ulysses, std::int64_t heads = 4, std::int64_t kv_heads = 2) {
  MeshShape mesh;
  mesh.set(Axis::kRing, ring);
  mesh.set(Axis::kUlysses, ulysses);
  AttentionOptions options;
  options.strategy = strategy;
  return make_plan(mesh, {1, 37, 37, heads, kv_heads, 8, 8, DType::kF32}, options);
}

Step& step_of(Plan& plan, Verb verb, int number = 0) {
  for (Step& step : plan.steps) {
    if (step.verb == verb && number-- == 0) return step;
  }
  throw std::logic_error("no such step");
}

void drop(Plan& plan, Verb verb, int number, ValueId instead) {
  Step& step = step_of(plan, verb, number);
  const ValueId out = step.out[0];
  const auto index = &step - plan.steps.data();
  plan.steps.erase(plan.steps.begin() + index);
  for (Step& later : plan.steps) std::replace(later.in.begin(), later.in.end(), out, instead);
  std::replace(plan.outputs.begin(), plan.outputs.end(), out, instead);
}

TEST(Verify, ProvesEveryStrategy) {
  for (const auto& [strategy, ring, ulysses] :
       {std::tuple{"ring", 5, 1}, {"ulysses", 1, 3}, {"hybrid", 3, 2}, {"allgather", 4, 2}}) {
    const Plan plan = plan_of(strategy, ring, ulysses);
    const Verdict forward = verify(plan), gradient = verify(backward(plan));
    EXPECT_TRUE(forward.ok()) << strategy << ": " << forward.problems[0];
    EXPECT_TRUE(gradient.ok()) << strategy << ": " << gradient.problems[0];
    EXPECT_EQ(forward.pairs, 37 * 38 / 2);
  }
}

struct Fault {
  std::string name;
  std::function<Plan()> make;
  std::string says;
};

class BrokenPlan : public testing::TestWithParam<Fault> {};

TEST_P(BrokenPlan, IsCaught) {
  const Verdict verdict = verify(GetParam().make());
  ASSERT_FALSE(verdict.ok());
  EXPECT_NE(verdict.problems[0].find("rank "), std::string::npos) << verdict.problems[0];
  const bool found = std::any_of(verdict.problems.begin(), verdict.problems.end(),
                                 [](const std::string& problem) { return problem.find(GetParam().says) != std::string::npos; });
  EXPECT_TRUE(found) << "wanted: " << GetParam().says << "\ngot: " << verdict.problems[0];
}

std::vector<Fault> faults() {
  return {
      {"DroppedHop",
       [] {
         Plan p = plan_of("ring", 4, 1);
         drop(p, Verb::kAttend, 3, step_of(p, Verb::kAttend, 2).out[0]);
         return p;
       },
       "visible pairs"},
      {"AttendsTwice",
       [] {
         Plan p = plan_of("ring", 4, 1);
         step_of(p, Verb::kAttend, 2).in[1] = step_of(p, Verb::kAttend, 1).in[1];
         return p;
       },
       "twice"},
      {"ForgetsTheState",
       [] {
         Plan p = plan_of("ring", 3, 1);
         step_of(p, Verb::kAttend, 2).in.pop_back();
         return p;
       },
       "visible pairs"},
      {"ReadsBeforeWriting",
       [] {
         Plan p = plan_of("ring", 3, 1);
         std::swap(p.steps[1], p.steps[2]);
         return p;
       },
       "before it is written"},
      {"WritesTwice",
       [] {
         Plan p = plan_of("ring", 3, 1);
         p.steps[3].out = p.steps[1].out;
         return p;
       },
       "written twice"},
      {"ReadsAGivenAwayState",
       [] {
         Plan p = plan_of("ring", 3, 1);
         p.steps.back().in[0] = step_of(p, Verb::kAttend, 0).out[0];
         return p;
       },
       "given away"},
      {"WrongPeer",
       [] {
         Plan p = plan_of("ring", 4, 1);
         step_of(p, Verb::kRotate, 1).shift = 2;
         return p;
       },
       "positions"},
      {"WrongAxis",
       [] {
         Plan p = plan_of("hybrid", 2, 2);
         step_of(p, Verb::kRotate).axis = Axis::kUlysses;
         return p;
       },
       "positions"},
      {"HeadsStaySplit",
       [] {
         Plan p = plan_of("ulysses", 1, 3);
         drop(p, Verb::kHeadToSeq, 0, step_of(p, Verb::kFinish).out[0]);
         return p;
       },
       "owner"},
      {"QueriesStayHome",
       [] {
         Plan p = plan_of("ulysses", 1, 2);
         step_of(p, Verb::kAttend).in[0] = 0;
         return p;
       },
       "need KV heads"},
      {"KeysStayHome",
       [] {
         Plan p = plan_of("ulysses", 1, 2);
         step_of(p, Verb::kAttend).in[1] = 1;
         return p;
       },
       "visible pairs"},
      {"GatherForgotten",
       [] {
         Plan p = plan_of("allgather", 3, 1);
         drop(p, Verb::kGather, 0, 1);
         return p;
       },
       "visible pairs"},
      {"GradientNotSentHome",
       [] {
         Plan p = backward(plan_of("ring", 3, 1));
         drop(p, Verb::kRotate, 3, step_of(p, Verb::kRotate, 3).in[0]);
         return p;
       },
       "positions"},
      {"GradientPieceLost",
       [] {
         Plan p = backward(plan_of("ring", 3, 1));
         drop(p, Verb::kAdd, 0, step_of(p, Verb::kAdd).in[0]);
         return p;
       },
       "visible pairs"},
      {"GradientAddedTwice",
       [] {
         Plan p = backward(plan_of("ring", 3, 1));
         Step& add = step_of(p, Verb::kAdd, 1);
         add.in[1] = add.in[0];
         return p;
       },
       "twice"},
      {"OwnBlockLost",
       [] {
         Plan p = backward(plan_of("ring", 3, 1));
         drop(p, Verb::kAdd, 1, step_of(p, Verb::kAdd, 1).in[1]);
         return p;
       },
       "visible pairs"},
      {"GradientOfQueriesLost",
       [] {
         Plan p = backward(plan_of("ring", 3, 1));
         step_of(p, Verb::kAttendGrad, 1).in[3] = kNoValue;
         return p;
       },
       "visible pairs"},
      {"SumNotScattered",
       [] {
         Plan p = backward(plan_of("allgather", 3, 1));
         drop(p, Verb::kReduceScatter, 0, step_of(p, Verb::kReduceScatter).in[0]);
         return p;
       },
       "owner"},
      {"WrongOutput",
       [] {
         Plan p = plan_of("hybrid", 2, 2);
         p.outputs[0] = step_of(p, Verb::kFinish).out[0];
         return p;
       },
       "owner"},
  };
}

INSTANTIATE_TEST_SUITE_P(Faults, BrokenPlan, testing::ValuesIn(faults()), [](const auto& fault) { return fault.param.name; });

}  // namespace
}  // namespace dattn
