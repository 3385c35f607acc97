// What the tests of core/nn share: random tensors, directional finite differences, small batches and models.
#pragma once

#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "core/base/philox.h"
#include "core/nn/local_attention.h"
#include "core/nn/transformer.h"

namespace dattn::testing {

inline void fill_normal(const TensorView& view, std::uint64_t stream, float deviation = 1.0f) {
  for (std::int64_t i = 0; i < view.elements(); ++i) {
    view.ptr<float>()[i] = deviation * philox_normal(99, stream, static_cast<std::uint64_t>(i));
  }
}

inline Tensor normal(const Shape& shape, std::uint64_t stream, float deviation = 1.0f) {
  Tensor tensor(DType::kF32, shape);
  fill_normal(tensor, stream, deviation);
  return tensor;
}

inline double dot(const TensorView& a, const TensorView& b) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < a.elements(); ++i) {
    sum += static_cast<double>(a.ptr<float>()[i]) * static_cast<double>(b.ptr<float>()[i]);
  }
  return sum;
}

inline double largest_difference(const TensorView& a, const TensorView& b) {
  EXPECT_EQ(a.shape.text(), b.shape.text());
  double largest = 0.0;
  for (std::int64_t i = 0; i < a.elements(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a.ptr<float>()[i]) - static_cast<double>(b.ptr<float>()[i])));
  }
  return largest;
}

inline double largest(const TensorView& a) {
  double found = 0.0;
  for (std::int64_t i = 0; i < a.elements(); ++i) found = std::max(found, std::abs(static_cast<double>(a.ptr<float>()[i])));
  return found;
}

// What rounding of an fp32 loss makes of a difference quotient.
inline constexpr double kNoise = 2e-5;

// Compares <gradient, d> with the central difference of `loss` along a random direction d of `x`, several times.
inline void expect_gradient(const TensorView& x, const TensorView& gradient, const std::function<double()>& loss,
                            const std::string& what, double tolerance = 2e-3, double step = 1e-2) {
  if (x.elements() == 0) return;
  const Tensor start = to_dtype(x, DType::kF32);
  for (std::uint64_t trial = 0; trial < 3; ++trial) {
    const Tensor direction = normal(x.shape, 1000 + trial, 1.0f / std::sqrt(static_cast<float>(x.elements())));
    double values[2];
    for (int side = 0; side < 2; ++side) {
      const double signed_step = side == 0 ? step : -step;
      for (std::int64_t i = 0; i < x.elements(); ++i) {
        x.ptr<float>()[i] = start.ptr<float>()[i] + static_cast<float>(signed_step) * direction.ptr<float>()[i];
      }
      values[side] = loss();
    }
    copy(start, x);
    const double measured = (values[0] - values[1]) / (2.0 * step), computed = dot(gradient, direction);
    // A random direction sees about |gradient| / sqrt(elements) of a gradient: that is the scale of what may differ.
    const double scale = std::sqrt(dot(gradient, gradient) / static_cast<double>(x.elements()));
    EXPECT_NEAR(measured, computed, tolerance * (scale + std::abs(computed)) + kNoise) << what << ", trial " << trial;
  }
}

// A batch that owns its tokens: B rows of S random tokens, each predicting the next; some targets carry no loss.
struct OwnedBatch {
  std::vector<std::int32_t> tokens, targets;
  std::vector<std::int64_t> positions;
  TokenBatch view;

  OwnedBatch(std::int64_t batch, std::int64_t seq, std::int64_t vocab) : positions(static_cast<std::size_t>(seq)) {
    std::iota(positions.begin(), positions.end(), 0);
    for (std::int64_t i = 0; i < batch * seq; ++i) {
      const auto token = [&](std::uint64_t stream) {
        return static_cast<std::int32_t>(philox_uniform(7, stream, static_cast<std::uint64_t>(i)) * static_cast<float>(vocab));
      };
      tokens.push_back(token(1));
      targets.push_back(i % 7 == 3 ? -1 : token(2));
    }
    view.batch = batch;
    view.tokens = tokens;
    view.targets = targets;
    view.positions = positions;
    view.batch_begin = 5;
    view.step = 11;
    view.loss_scale = 1.0 / static_cast<double>(batch * seq);
  }
};

inline ModelConfig small_model(const std::string& style) {
  ModelConfig config = model_style(style);
  config.layers = 2;
  config.dim = 24;
  config.heads = 6;
  config.head_dim = 4;
  config.kv_heads = style == "llama" ? 2 : 6;
  config.hidden = 40;
  config.vocab = 29;
  config.max_seq = 16;
  return config;
}

// Larger values than a model starts with, so that every path carries a gradient that stands out of rounding.
inline void scale_up(const Transformer& model) {
  for (Parameter* parameter : model.parameters()) {
    const float factor = parameter->decays ? 6.0f : 1.0f;
    for (std::int64_t i = 0; i < parameter->elements(); ++i) {
      float& value = parameter->value.ptr<float>()[i];
      value = value * factor;
    }
  }
}

}  // namespace dattn::testing
