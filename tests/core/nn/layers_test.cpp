// Each layer on its own: hand numbers where they are easy, finite differences for gradients.
#include "core/nn/activation.h"
#include "core/nn/cross_entropy.h"
#include "core/nn/embedding.h"
#include "core/nn/norm.h"
#include "core/nn/residual.h"
#include "core/nn/rope.h"
#include "core/nn/vector_math.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

using testing::dot;
using testing::expect_gradient;
using testing::normal;

Parameter whole_parameter(const Shape& shape, std::uint64_t stream) {
  Parameter parameter;
  parameter.value = normal(shape, stream);
  parameter.gradient = Tensor(DType::kF32, shape);
  parameter.global_shape = shape;
  parameter.held = parameter.owned = {0, shape[0]};
  return parameter;
}

TEST(VectorMath, CloseToTheLibrary) {
  for (double x = -87.0; x < 88.0; x += 0.0137) {
    const double exact = std::exp(static_cast<double>(static_cast<float>(x)));
    ASSERT_NEAR(fast_exp(static_cast<float>(x)) / exact, 1.0, 2e-7) << x;
  }
  for (double x = -12.0; x < 12.0; x += 0.0037) ASSERT_NEAR(fast_tanh(static_cast<float>(x)), std::tanh(x), 5e-7) << x;
  for (double x = 1e-30; x < 1e30; x *= 1.7) ASSERT_NEAR(fast_sqrt(static_cast<float>(x)) / std::sqrt(x), 1.0, 3e-7) << x;
  EXPECT_EQ(fast_sqrt(0.0f), 0.0f);
  EXPECT_EQ(fast_exp(-INFINITY), 0.0f);
  EXPECT_EQ(fast_exp(0.0f), 1.0f);
  EXPECT_TRUE(std::isnan(fast_exp(NAN)));
}

TEST(Norm, GradientsByFiniteDifferences) {
  for (const bool centered : {true, false}) {
    Parameter weight = whole_parameter({13}, 1), bias = whole_parameter({13}, 2);
    const Norm norm{&weight, centered ? &bias : nullptr, centered, 1e-5f};
    const Tensor x = normal({70, 13}, 3), dy = normal({70, 13}, 4), stats(DType::kF32, {70, 2});
    const auto loss = [&] { return dot(norm_forward(norm, x, stats), dy); };
    loss();
    Tensor dx(DType::kF32, {70, 13});
    const Tensor own_stats = stats.clone();
    norm_backward(norm, x, own_stats, dy, dx);
    expect_gradient(x, dx, loss, centered ? "layernorm x" : "rmsnorm x");
    expect_gradient(weight.value, weight.gradient, loss, "weight");
    if (centered) expect_gradient(bias.value, bias.gradient, loss, "bias");
  }
}

TEST(Norm, HandNumbers) {
  Parameter weight = whole_parameter({2}, 1);
  weight.value->at<float>(0) = weight.value->at<float>(1) = 1.0f;
  Tensor x(DType::kF32, {1, 2}), stats(DType::kF32, {1, 2});
  x->at<float>(0, 0) = 3.0f;
  x->at<float>(0, 1) = 4.0f;
  const Tensor rms = norm_forward({&weight, nullptr, false, 0.0f}, x, stats);
  EXPECT_NEAR(rms->at<float>(0, 0), 3.0 / std::sqrt(12.5), 1e-6);
  const Tensor layer = norm_forward({&weight, nullptr, true, 0.0f}, x, stats);
  EXPECT_NEAR(layer->at<float>(0, 0), -1.0, 1e-5);
  EXPECT_NEAR(layer->at<float>(0, 1), 1.0, 1e-5);
}

TEST(Norm, WritesTheTypeAskedFor) {
  Parameter weight = whole_parameter({9}, 1), bias = whole_parameter({9}, 2);
  const Tensor x = normal({4, 9}, 3), stats(DType::kF32, {4, 2});
  for (Parameter* b : {&bias, static_cast<Parameter*>(nullptr)}) {
    const Norm norm{&weight, b, b != nullptr, 1e-5f};
    const Tensor exact = norm_forward(norm, x, stats), rounded = norm_forward(norm, x, stats, DType::kBF16);
    ASSERT_EQ(rounded->dtype, DType::kBF16);
    const Tensor wide = to_dtype(rounded, DType::kF32);
    for (std::int64_t i = 0; i < exact->elements(); ++i)
      EXPECT_NEAR(wide.ptr<float>()[i], exact.ptr<float>()[i], std::abs(exact.ptr<float>()[i]) / 256);
  }
}

TEST(Activation, GradientsByFiniteDifferences) {
  const Tensor up = normal({5, 9}, 1), gate = normal({5, 9}, 2), da = normal({5, 9}, 3);
  const GeluGradients gelu = gelu_backward(up, da);
  EXPECT_EQ(testing::largest_difference(gelu.a, gelu_forward(up)), 0.0);
  expect_gradient(
      up, gelu.du, [&] { return dot(gelu_forward(up), da); }, "gelu");
  const SwigluGradients swiglu = swiglu_backward(gate, up, da);
  EXPECT_EQ(testing::largest_difference(swiglu.a, swiglu_forward(gate, up)), 0.0);
  const auto loss = [&] { return dot(swiglu_forward(gate, up), da); };
  expect_gradient(up, swiglu.dup, loss, "swiglu up");
  expect_gradient(gate, swiglu.dgate, loss, "swiglu gate");
}

TEST(Activation, HandNumbers) {
  Tensor u(DType::kF32, {1, 1});
  u->at<float>(0, 0) = 1.0f;
  EXPECT_NEAR(gelu_forward(u)->at<float>(0, 0), 0.841192, 1e-5);  // tanh form
  EXPECT_NEAR(swiglu_forward(u, u)->at<float>(0, 0), 1.0 / (1.0 + std::exp(-1.0)), 1e-6);
}

// Scores depend on differences of positions only, and turning back undoes turning.
TEST(Rope, KeepsScoresOfEqualDistance) {
  const Tensor start = normal({1, 1, 2, 8}, 1);
  const auto score = [&](std::int64_t q_position, std::int64_t k_position) {
    Tensor q = start.clone(), k = start.clone();
    const std::vector<std::int64_t> qp{q_position}, kp{k_position};
    rope_apply(q, rope_table(qp, 8, 10000.0), false);
    rope_apply(k, rope_table(kp, 8, 10000.0), false);
    return dot(q, k);
  };
  EXPECT_NEAR(score(5, 2), score(105, 102), 1e-4);
  EXPECT_NEAR(score(1000000005, 1000000002), score(5, 2), 1e-4);
  EXPECT_GT(std::abs(score(5, 2) - score(5, 4)), 1e-2);
  Tensor x = start.clone();
  const std::vector<std::int64_t> position{77};
  const Tensor table = rope_table(position, 8, 10000.0);
  rope_apply(x, table, false);
  EXPECT_GT(testing::largest_difference(x, start), 1e-2);
  rope_apply(x, table, true);
  EXPECT_LT(testing::largest_difference(x, start), 1e-6);
}

TEST(Dropout, DropsTheSameElementsWhereverRowsAre) {
  const std::vector<std::int64_t> positions{0, 1, 2, 3, 4, 5};
  const Dropout dropout{0.3, 1, 2, 3};
  const std::int64_t dim = 250;
  Tensor all(DType::kF32, {12, dim});
  for (std::int64_t i = 0; i < all->elements(); ++i) all.ptr<float>()[i] = 1.0f;
  Tensor row = to_dtype(all->slice(0, 0, 1), DType::kF32);
  dropout_apply(dropout, {0, 12, positions, 40}, all);
  double kept = 0;
  for (std::int64_t i = 0; i < all->elements(); ++i) {
    const float value = all.ptr<float>()[i];
    ASSERT_TRUE(value == 0.0f || std::abs(value - 1.0f / 0.7f) < 1e-6f);
    kept += value != 0.0f;
  }
  EXPECT_NEAR(kept / static_cast<double>(all->elements()), 0.7, 0.03);
  // Batch row 41, position 4, held alone by a rank whose batch starts there and whose residual rows start at row 1 of 2.
  const std::vector<std::int64_t> two{2, 4};
  dropout_apply(dropout, {1, 1, two, 41}, row);
  EXPECT_EQ(testing::largest_difference(row, all->slice(0, 10, 1)), 0.0);
  Tensor other(DType::kF32, {1, dim});
  for (std::int64_t i = 0; i < dim; ++i) other.ptr<float>()[i] = 1.0f;
  dropout_apply({0.3, 1, 3, 3}, {1, 1, two, 41}, other);
  EXPECT_GT(testing::largest_difference(row, other), 1.0);  // another step drops others
}

TEST(Residual, GradientsByFiniteDifferences) {
  const std::vector<std::int64_t> positions{0, 1, 2};
  const TokenRows rows{1, 4, positions, 0};
  Parameter bias = whole_parameter({10}, 1);
  const Tensor x = normal({4, 10}, 2), branch = normal({4, 10}, 3), dy = normal({4, 10}, 4);
  for (const double p : {0.0, 0.4}) {
    const Dropout dropout{p, 1, 2, 3};
    const auto loss = [&] { return dot(residual_forward(dropout, rows, x, branch.clone(), &bias), dy); };
    fill_zero(bias.gradient);
    const Tensor dbranch = residual_backward(dropout, rows, dy, &bias);
    expect_gradient(branch, dbranch, loss, "branch");
    expect_gradient(bias.value, bias.gradient, loss, "bias");
    expect_gradient(x, dy, loss, "x");
  }
}

TEST(Embedding, SlicesAddUpAndGradientsScatter) {
  const std::vector<std::int32_t> tokens{0, 4, 2, 4};
  Parameter whole = whole_parameter({5, 3}, 1), slice = whole_parameter({5, 3}, 1);
  slice.held = {2, 5};
  slice.value = to_dtype(whole.value->slice(0, 2, 3), DType::kF32);
  slice.gradient = Tensor(DType::kF32, {3, 3});
  const Tensor x = embedding_forward(whole, tokens), part = embedding_forward(slice, tokens);
  EXPECT_EQ(part->at<float>(0, 1), 0.0f);
  EXPECT_EQ(part->at<float>(1, 1), x->at<float>(1, 1));
  const Tensor dx = normal({4, 3}, 2);
  embedding_backward(slice, tokens, dx);
  EXPECT_FLOAT_EQ(slice.gradient->at<float>(2, 1), dx->at<float>(1, 1) + dx->at<float>(3, 1));
  EXPECT_EQ(slice.gradient->at<float>(1, 0), 0.0f);
}

TEST(CrossEntropy, GradientsByFiniteDifferences) {
  VocabularyReduction none;
  const std::vector<std::int32_t> targets{3, -1, 0, 10};
  const Tensor logits = normal({4, 11}, 1, 3.0f);
  const auto loss = [&] { return cross_entropy(logits.clone(), 0, targets, 0.25, none, false); };
  const Tensor gradient = logits.clone();
  EXPECT_DOUBLE_EQ(cross_entropy(gradient, 0, targets, 0.25, none, true), loss());
  expect_gradient(logits, gradient, loss, "logits");
  EXPECT_EQ(testing::largest(gradient->slice(0, 1, 1)), 0.0);
}

TEST(CrossEntropy, HandNumbersAndHugeLogits) {
  VocabularyReduction none;
  const std::vector<std::int32_t> target{1};
  const Tensor even(DType::kF32, {1, 4});
  EXPECT_NEAR(cross_entropy(even, 0, target, 1.0, none, false), std::log(4.0), 1e-6);
  Tensor huge(DType::kF32, {1, 3});
  huge->at<float>(0, 0) = 30000.0f;
  huge->at<float>(0, 1) = 29999.0f;
  EXPECT_NEAR(cross_entropy(huge, 0, target, 1.0, none, false), 1.0 + std::log1p(std::exp(-1.0)), 1e-5);
}

}  // namespace
}  // namespace dattn
