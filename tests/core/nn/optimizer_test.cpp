#include "core/nn/optimizer.h"

#include <array>

#include "core/base/error.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

Parameter parameter_of(std::vector<float> values, std::vector<float> gradients, bool decays) {
  Parameter parameter;
  const auto count = static_cast<std::int64_t>(values.size());
  parameter.value = Tensor(DType::kF32, {count});
  parameter.gradient = Tensor(DType::kF32, {count});
  std::copy(values.begin(), values.end(), parameter.value.ptr<float>());
  std::copy(gradients.begin(), gradients.end(), parameter.gradient.ptr<float>());
  parameter.global_shape = {count};
  parameter.held = parameter.owned = {0, count};
  parameter.decays = decays;
  return parameter;
}

// After one step m / c1 = g and v / c2 = g^2, so the step is rate * sign(g), but for epsilon; decay comes on top.
TEST(AdamW, FirstStepByHand) {
  Parameter decayed = parameter_of({1.0f, -2.0f}, {0.5f, -4.0f}, true), plain = parameter_of({3.0f}, {0.25f}, false);
  std::vector<Parameter*> all{&decayed, &plain};
  AdamW optimizer(all, {.weight_decay = 0.1});
  optimizer.step(0.01);
  EXPECT_NEAR(decayed.value->at<float>(0), 1.0 * (1 - 0.001) - 0.01, 1e-6);
  EXPECT_NEAR(decayed.value->at<float>(1), -2.0 * (1 - 0.001) + 0.01, 1e-6);
  EXPECT_NEAR(plain.value->at<float>(0), 3.0 - 0.01, 1e-6);
  EXPECT_EQ(optimizer.steps_done(), 1);
}

TEST(AdamW, SecondStepByHand) {
  Parameter p = parameter_of({0.0f}, {1.0f}, false);
  std::vector<Parameter*> all{&p};
  AdamW optimizer(all, {.beta1 = 0.5, .beta2 = 0.75, .epsilon = 0.0});
  optimizer.step(1.0);
  p.gradient->at<float>(0) = 8.0f;
  optimizer.step(1.0, 0.25);  // the gradient becomes 2
  // m = 0.5 * 0.5 + 0.5 * 2 = 1.25, c1 = 0.75; v = 0.75 * 0.25 + 0.25 * 4 = 1.1875, c2 = 0.4375
  EXPECT_NEAR(p.value->at<float>(0), -1.0 - (1.25 / 0.75) / std::sqrt(1.1875 / 0.4375), 1e-6);
  EXPECT_NEAR(optimizer.moments()[0].m->at<float>(0), 1.25, 1e-6);
  EXPECT_NEAR(optimizer.moments()[0].v->at<float>(0), 1.1875, 1e-6);
}

TEST(AdamW, ContinuesFromItsState) {
  Parameter a = parameter_of({1.0f, 2.0f}, {0.3f, -0.2f}, true), b = parameter_of({1.0f, 2.0f}, {0.3f, -0.2f}, true);
  std::vector<Parameter*> first{&a}, second{&b};
  AdamW straight(first, {}), before(second, {});
  for (int step = 0; step < 4; ++step) straight.step(0.01);
  for (int step = 0; step < 2; ++step) before.step(0.01);
  AdamW after(second, {});
  copy(before.moments()[0].m, after.moments()[0].m);
  copy(before.moments()[0].v, after.moments()[0].v);
  after.set_steps_done(before.steps_done());
  for (int step = 0; step < 2; ++step) after.step(0.01);
  EXPECT_EQ(testing::largest_difference(a.value, b.value), 0.0);
}

TEST(Clip, NormCountsWhatIsOwned) {
  Parameter p = parameter_of({0, 0, 0}, {3.0f, 4.0f, 100.0f}, false);
  p.owned = {0, 2};
  EXPECT_DOUBLE_EQ(squared_norm(std::array{ParameterRun{&p, {0, 3}}}), 25.0);
  EXPECT_DOUBLE_EQ(squared_norm(std::array{ParameterRun{&p, {1, 3}}}), 16.0);
  EXPECT_DOUBLE_EQ(squared_norm(std::array{ParameterRun{&p, {2, 3}}}), 0.0);
  EXPECT_DOUBLE_EQ(clip_factor(5.0, 1.0), 0.2);
  EXPECT_DOUBLE_EQ(clip_factor(0.5, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(clip_factor(5.0, 0.0), 1.0);
}

TEST(ScheduleTest, WarmUpThenDecay) {
  const Schedule cosine{.kind = "cosine", .peak = 1.0, .floor = 0.1, .warmup = 4, .steps = 12};
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 0), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 3), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 4), 1.0);
  EXPECT_NEAR(learning_rate(cosine, 8), 0.55, 1e-12);
  EXPECT_NEAR(learning_rate(cosine, 12), 0.1, 1e-12);
  Schedule linear = cosine;
  linear.kind = "linear";
  EXPECT_NEAR(learning_rate(linear, 6), 0.1 + 0.9 * 0.75, 1e-12);
  Schedule constant = cosine;
  constant.kind = "constant";
  EXPECT_DOUBLE_EQ(learning_rate(constant, 11), 1.0);
  constant.kind = "exponential";
  EXPECT_THROW(learning_rate(constant, 0), Error);
}

TEST(ScheduleTest, WarmUpLongerThanTheRunIsClamped) {
  const Schedule schedule{.kind = "linear", .peak = 1.0, .warmup = 100, .steps = 4};
  EXPECT_DOUBLE_EQ(learning_rate(schedule, 0), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(schedule, 3), 1.0);
}

}  // namespace
}  // namespace dattn
