#include "core/nn/matmul.h"

#include <cstring>
#include <thread>

#include "core/base/threads.h"
#include "core/nn/linear.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

using testing::normal;

double product(const TensorView& a, const TensorView& b, std::int64_t i, std::int64_t j) {
  return dispatch_float(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    double sum = 0.0;
    for (std::int64_t k = 0; k < a.size(1); ++k) sum += static_cast<double>(a.at<T>(i, k)) * static_cast<double>(b.at<T>(k, j));
    return sum;
  });
}

// Every combination of transposes, types, bias and accumulation on shapes that include ones and odd numbers.
class MatmulShapes : public ::testing::TestWithParam<std::array<std::int64_t, 3>> {};

TEST_P(MatmulShapes, AgreesWithPlainSums) {
  const auto [m, n, k] = GetParam();
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int flags = 0; flags < 16; ++flags) {
      const bool turn_a = flags & 1, turn_b = flags & 2, with_bias = flags & 4, accumulate = flags & 8;
      if (with_bias && accumulate) continue;
      const Tensor a = to_dtype(normal(turn_a ? Shape{k, m} : Shape{m, k}, 1), type);
      const Tensor b = to_dtype(normal(turn_b ? Shape{n, k} : Shape{k, n}, 2), type);
      const Tensor bias = normal({n}, 3), before = normal({m, n}, 4);
      Tensor c = before.clone();
      const TensorView av = turn_a ? a->transpose(0, 1) : a.view(), bv = turn_b ? b->transpose(0, 1) : b.view();
      matmul(av, bv, c, {.bias = with_bias ? bias.ptr<float>() : nullptr, .accumulate = accumulate});
      for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const double expected = product(av, bv, i, j) + (with_bias ? static_cast<double>(bias->at<float>(j)) : 0.0) +
                                  (accumulate ? static_cast<double>(before->at<float>(i, j)) : 0.0);
          ASSERT_NEAR(c->at<float>(i, j), expected, 1e-5 * std::sqrt(static_cast<double>(k) + 1) * 3)
              << name_of(type) << " flags " << flags << " at " << i << ", " << j;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, MatmulShapes,
                         ::testing::Values(std::array<std::int64_t, 3>{1, 1, 1}, std::array<std::int64_t, 3>{1, 17, 33},
                                           std::array<std::int64_t, 3>{5, 1, 7}, std::array<std::int64_t, 3>{37, 19, 1},
                                           std::array<std::int64_t, 3>{64, 48, 32}, std::array<std::int64_t, 3>{33, 65, 29}));

TEST(Matmul, EmptyExtents) {
  const Tensor a(DType::kF32, {3, 0}), b(DType::kF32, {0, 2}), bias = normal({2}, 1);
  Tensor c = normal({3, 2}, 2);
  const Tensor before = c.clone();
  matmul(a, b, c, {.accumulate = true});
  EXPECT_EQ(testing::largest_difference(c, before), 0.0);
  matmul(a, b, c, {.bias = bias.ptr<float>()});
  EXPECT_EQ(c->at<float>(2, 1), bias->at<float>(1));
  matmul(Tensor(DType::kF32, {0, 4}), Tensor(DType::kF32, {4, 2}), Tensor(DType::kF32, {0, 2}));
}

TEST(Matmul, ReadsSlicesOfLargerMatrices) {
  const Tensor large = normal({10, 12}, 1), b = normal({5, 6}, 2);
  const TensorView window = large->slice(1, 3, 5).slice(0, 2, 7);
  Tensor c(DType::kF32, {7, 6});
  matmul(window, b, c);
  EXPECT_NEAR(c->at<float>(6, 5), product(window, b, 6, 5), 1e-5);
}

TEST(Matmul, RepeatsItsBitsFromSeveralThreads) {
  const Tensor a = normal({130, 70}, 1), b = normal({70, 90}, 2), bias = normal({90}, 3);
  std::array<Tensor, 4> results;
  std::vector<std::thread> threads;
  for (Tensor& result : results) {
    threads.emplace_back([&] {
      set_num_threads(1);
      result = Tensor(DType::kF32, {130, 90});
      for (int repeat = 0; repeat < 3; ++repeat) matmul(a, b, result, {.bias = bias.ptr<float>()});
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Tensor& result : results) {
    EXPECT_EQ(std::memcmp(result.ptr<float>(), results[0].ptr<float>(), static_cast<std::size_t>(result->bytes())), 0);
  }
}

TEST(Linear, GradientsByFiniteDifferences) {
  Parameter weight, bias;
  weight.value = normal({7, 5}, 1);
  weight.gradient = Tensor(DType::kF32, {7, 5});
  bias.value = normal({7}, 2);
  bias.gradient = Tensor(DType::kF32, {7});
  const Linear layer{&weight, &bias};
  const Tensor x = normal({9, 5}, 3), dy = normal({9, 7}, 4);
  const auto loss = [&] { return testing::dot(linear_forward(layer, x, DType::kF32), dy); };
  Tensor dx(DType::kF32, {9, 5});
  linear_backward_weights(layer, x, dy);
  linear_backward_input(layer, dy, dx, false);
  testing::expect_gradient(weight.value, weight.gradient, loss, "weight");
  testing::expect_gradient(bias.value, bias.gradient, loss, "bias");
  testing::expect_gradient(x, dx, loss, "x");
}

// Few outputs and long sums: what a library spreads over threads by cutting the sums.
TEST(Matmul, OneThreadHasTheSameBitsOnAnyNumberOfThreads) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Tensor a = to_dtype(normal({20, 20000}, 1), type), b = to_dtype(normal({20000, 40}, 2), type);
    const Tensor bias = normal({40}, 3);
    for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(bias.ptr<float>())}) {
      Tensor results[2];
      for (const int threads : {1, 4}) {
        set_num_threads(threads);
        Tensor& c = results[threads == 4] = Tensor(DType::kF32, {20, 40});
        matmul(a, b, c, {.bias = added, .fixed = true});
        EXPECT_EQ(num_threads(), threads);
      }
      set_num_threads(1);
      EXPECT_EQ(std::memcmp(results[0]->data, results[1]->data, static_cast<std::size_t>(results[0]->bytes())), 0);
    }
  }
}

}  // namespace
}  // namespace dattn
