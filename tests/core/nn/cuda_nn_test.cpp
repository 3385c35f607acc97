// The layers' operations on a CUDA device give what they give on the host. The tests' module runs on host memory
// (tests/standins/cuda); DATTN_CUDA_MODULE names it.
#include <cmath>
#include <functional>

#include <gtest/gtest.h>

#include "core/device/tf32.h"
#include "core/nn/activation.h"
#include "core/nn/cross_entropy.h"
#include "core/nn/embedding.h"
#include "core/nn/linear.h"
#include "core/nn/matmul.h"
#include "core/nn/norm.h"
#include "core/nn/on_cuda.h"
#include "core/nn/optimizer.h"
#include "core/nn/residual.h"
#include "core/nn/rope.h"
#include "tests/core/device/on_cuda.h"
#include "tests/core/nn/support.h"

namespace dattn::testing {
namespace {

// A device's product may round its bias as it rounds the result.
constexpr double kRoundedTwice = 1.6e-2;

// Runs a body on the host and on the device: inputs come through in(), results go through out().
class CudaNnTest : public OnCuda {
 protected:
  // A random tensor, the same on both sides.
  Tensor in(DType dtype, const Shape& shape, std::uint64_t stream) {
    const DeviceScope host(Device{});
    return to_device(to_dtype(normal(shape, stream), dtype), device_);
  }
  Parameter parameter(const Shape& shape, std::uint64_t stream) {
    Parameter made;
    made.global_shape = shape;
    made.held = made.owned = {0, shape[0]};
    made.value = in(DType::kF32, shape, stream);
    made.gradient = in(DType::kF32, shape, stream + 1);
    return made;
  }
  void out(const TensorView& result) { results_.push_back(to_dtype(to_device(result, Device{}), DType::kF64)); }

  void same(const std::function<void()>& body, double tolerance = 2e-6) {
    body();
    std::vector<Tensor> expected = std::move(results_);
    results_.clear();
    device_ = kCuda;
    {
      const DeviceScope scope(kCuda);
      body();
    }
    ASSERT_EQ(results_.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(results_[i]->shape, expected[i]->shape);
      double largest = 0;
      for (std::int64_t e = 0; e < expected[i]->elements(); ++e) {
        const double want = expected[i].ptr<double>()[e], got = results_[i].ptr<double>()[e];
        largest = std::max(largest, std::isfinite(got) ? std::abs(got - want) / std::max(1.0, std::abs(want)) : INFINITY);
      }
      EXPECT_LE(largest, tolerance) << "result " << i;
    }
    device_ = {};
    results_.clear();
  }

  Device device_;
  std::vector<Tensor> results_;
};

TEST_F(CudaNnTest, MatrixProducts) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const DType result : {DType::kF32, DType::kBF16, DType::kF16}) {
      same(
          [&] {
            const Tensor a = in(type, {17, 23}, 1), b = in(type, {11, 23}, 2), bias = in(DType::kF32, {11}, 3),
                         c = in(result, {17, 11}, 4);
            matmul(a, b->transpose(0, 1), c, {.bias = bias.ptr<float>()});
            out(c);
            const Tensor d = in(DType::kF32, {23, 11}, 5), e = in(type, {17, 11}, 6);
            matmul(a->transpose(0, 1), e, d, {.accumulate = true});
            out(d);
          },
          is_half(result) ? kRoundedTwice : 1e-5);
    }
  }
}

TEST_F(CudaNnTest, ProductsThroughGelu) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::int64_t width : {16, 11}) {  // as one product, or two passes
      for (const bool biased : {true, false}) {
        same(
            [&] {
              Parameter weight = parameter({width, 23}, 1), bias = parameter({width}, 3);
              const Tensor x = in(type, {17, 23}, 5);
              Tensor y;
              out(linear_gelu_forward({&weight, biased ? &bias : nullptr}, x, type, y));
              out(y);
            },
            is_half(type) ? kRoundedTwice : 1e-5);
      }
    }
  }
}

// Factors of 10 bits where that is allowed: what is exact in them is as before, the rest near.
TEST_F(CudaNnTest, Tf32RoundsTheFactors) {
  const DeviceScope scope(kCuda);
  device_ = kCuda;
  const auto product_of = [&](const Tensor& a, const Tensor& b, bool tf32) {
    const Tensor c(DType::kF32, {17, 11});
    allow_tf32(tf32);
    matmul(a, b, c);
    allow_tf32(false);
    return to_device(c, Device{});
  };
  const Tensor a = in(DType::kF32, {17, 23}, 1), b = in(DType::kF32, {23, 11}, 2);
  const Tensor exact = product_of(a, b, false), rounded = product_of(a, b, true);
  EXPECT_GT(largest_difference(exact, rounded), 1e-6);
  EXPECT_LT(largest_difference(exact, rounded), 23 * 0x1p-9);
  const Tensor a16 = to_dtype(to_dtype(a, DType::kBF16), DType::kF32), b16 = to_dtype(to_dtype(b, DType::kBF16), DType::kF32);
  EXPECT_LT(largest_difference(product_of(a16, b16, false), product_of(a16, b16, true)), 1e-5);
}

TEST_F(CudaNnTest, ProductsOverNothing) {
  same([&] {
    const Tensor bias = in(DType::kF32, {5}, 1), c = in(DType::kF32, {3, 5}, 2);
    matmul(in(DType::kF32, {3, 0}, 3), in(DType::kF32, {0, 5}, 4), c, {.bias = bias.ptr<float>()});
    out(c);
  });
}

TEST_F(CudaNnTest, ColumnSums) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    same(
        [&] {
          const Tensor x = in(type, {150, 37}, 1), sums = in(DType::kF32, {37}, 2);
          add_column_sums(x, sums);
          out(sums);
        },
        1e-5);
  }
}

TEST_F(CudaNnTest, Activations) {
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    same(
        [&] {
          const Tensor u = in(type, {9, 33}, 1), gate = in(type, {9, 33}, 2), da = in(DType::kF32, {9, 33}, 3);
          out(gelu_forward(u));
          const GeluGradients g = gelu_backward(u, da);
          out(g.a);
          out(g.du);
          out(swiglu_forward(gate, u));
          const SwigluGradients s = swiglu_backward(gate, u, da);
          out(s.a);
          out(s.dgate);
          out(s.dup);
        },
        is_half(type) ? 8e-3 : 2e-6);
  }
}

TEST_F(CudaNnTest, Norms) {
  for (const bool centered : {true, false}) {
    same(
        [&] {
          Parameter weight = parameter({70}, 1), bias = parameter({70}, 3);
          const Norm norm{&weight, centered ? &bias : nullptr, centered, 1e-5f};
          const Tensor x = in(DType::kF32, {131, 70}, 5), dy = in(DType::kF32, {131, 70}, 6),
                       dx = in(DType::kF32, {131, 70}, 7);
          const Tensor stats(DType::kF32, {131, 2});
          out(norm_forward(norm, x, stats));
          out(stats);
          norm_backward(norm, x, stats, dy, dx);
          out(dx);
          out(weight.gradient);
          out(bias.gradient);
        },
        2e-5);
  }
}

TEST_F(CudaNnTest, RotaryPositions) {
  const std::vector<std::int64_t> positions{0, 5, 1000000007, 3};
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const bool inverse : {false, true}) {
      same(
          [&] {
            const Tensor x = in(type, {2, 4, 3, 10}, 1);
            rope_apply(x, rope_table(positions, 10, 10000.0), inverse);
            out(x);
          },
          is_half(type) ? 8e-3 : 2e-6);
    }
  }
}

TEST_F(CudaNnTest, ResidualStreamDropsTheSameElements) {
  const std::vector<std::int64_t> positions{9, 4, 1LL << 33};
  for (const double p : {0.0, 0.3}) {
    same([&] {
      const Tensor kept = to_device(std::span<const std::int64_t>(positions));
      const TokenRows rows{
          .begin = 2, .count = 4, .positions = positions, .batch_begin = 7, .on_device = kept.ptr<std::int64_t>()};
      const Dropout dropout{p, 11, 12, 13};
      Parameter bias = parameter({13}, 1);
      const Tensor x = in(DType::kF32, {4, 13}, 3);
      out(residual_forward(dropout, rows, x, in(DType::kF32, {4, 13}, 4), &bias));
      out(residual_backward(dropout, rows, x, &bias));
      out(bias.gradient);
    });
  }
}

TEST_F(CudaNnTest, Embeddings) {
  const std::vector<std::int32_t> tokens{3, 8, 3, 0, 5, 3};
  const std::vector<std::int64_t> positions{2, 0, 4};
  same([&] {
    Parameter table = parameter({6, 10}, 1), places = parameter({5, 10}, 3);
    table.global_shape = {9, 10};
    table.held = {2, 8};  // tokens 0 and 8 are elsewhere
    const TokenRows rows{.count = 6, .positions = positions};
    const Tensor x = embedding_forward(table, tokens), dx = in(DType::kF32, {6, 10}, 5);
    position_forward(places, rows, x);
    out(x);
    embedding_backward(table, tokens, dx);
    position_backward(places, rows, dx);
    out(table.gradient);
    out(places.gradient);
  });
}

TEST_F(CudaNnTest, CrossEntropy) {
  const std::vector<std::int32_t> targets{12, -1, 40, 3, 11};  // 3 and 40 are in other parts of the vocabulary
  VocabularyReduction alone;
  same([&] {
    const Tensor logits = in(DType::kF32, {5, 29}, 1);
    const double loss = cross_entropy(logits, 10, targets, 0.25, alone, true);
    out(logits);
    const TensorView number(const_cast<double*>(&loss), DType::kF64, {1});
    out(number);
  });
}

TEST_F(CudaNnTest, OptimizerAndNorm) {
  same([&] {
    Parameter weight = parameter({300, 7}, 1);
    weight.decays = true;
    Parameter* parameters[] = {&weight};
    AdamW optimizer(parameters, {});
    const double norm = squared_norm(whole_runs(parameters));
    out(TensorView(const_cast<double*>(&norm), DType::kF64, {1}));
    optimizer.step(1e-2, 0.5);
    optimizer.step(1e-2, 0.5);
    out(weight.value);
    out(optimizer.moments()[0].v);
  });
}

}  // namespace
}  // namespace dattn::testing
