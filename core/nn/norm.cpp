#include "core/nn/norm.h"

#include <cmath>

#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 64;  // rows of one block

DATTN_VECTORIZED void forward_row(const Norm& norm, const float* x, const float* w, const float* b, float* y, float* stats,
                                  std::int64_t dim) {
  float mean = 0.0f;
  if (norm.centered) {
#pragma omp simd reduction(+ : mean)
    for (std::int64_t j = 0; j < dim; ++j) mean += x[j];
    mean /= static_cast<float>(dim);
  }
  float variance = 0.0f;
#pragma omp simd reduction(+ : variance)
  for (std::int64_t j = 0; j < dim; ++j) variance += (x[j] - mean) * (x[j] - mean);
  const float scale = 1.0f / std::sqrt(variance / static_cast<float>(dim) + norm.epsilon);
  stats[0] = mean;
  stats[1] = scale;
  if (b != nullptr) {
    for (std::int64_t j = 0; j < dim; ++j) y[j] = (x[j] - mean) * scale * w[j] + b[j];
  } else {
    for (std::int64_t j = 0; j < dim; ++j) y[j] = (x[j] - mean) * scale * w[j];
  }
}

// With n = (x - mean) scale and g = dy w: dx = scale (g - mean(g) - n mean(g n)), without mean(g) for rmsnorm;
// dw = dy n, db = dy.
DATTN_VECTORIZED void backward_row(const Norm& norm, const float* x, const float* w, const float* stats, const float* dy,
                                   float* dx, float* dw, float* db, std::int64_t dim) {
  const float mean = stats[0], scale = stats[1];
  float sum_g = 0.0f, sum_gn = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gn)
  for (std::int64_t j = 0; j < dim; ++j) {
    const float n = (x[j] - mean) * scale, g = dy[j] * w[j];
    sum_g += g;
    sum_gn += g * n;
  }
  const float mean_g = norm.centered ? sum_g / static_cast<float>(dim) : 0.0f;
  const float mean_gn = sum_gn / static_cast<float>(dim);
#pragma omp simd
  for (std::int64_t j = 0; j < dim; ++j) {
    const float n = (x[j] - mean) * scale;
    dx[j] += scale * (dy[j] * w[j] - mean_g - n * mean_gn);
    dw[j] += dy[j] * n;
    db[j] += dy[j];
  }
}

DATTN_VECTORIZED void add_row(const float* from, float* to, std::int64_t dim) {
  for (std::int64_t j = 0; j < dim; ++j) to[j] += from[j];
}

}  // namespace

Tensor norm_forward(const Norm& norm, const TensorView& x, const TensorView& stats) {
  Tensor y = Tensor::uninitialized(DType::kF32, x.shape);
  const std::int64_t dim = x.size(1);
  const float* w = norm.weight->value.ptr<float>();
  const float* b = norm.bias != nullptr ? norm.bias->value.ptr<float>() : nullptr;
  parallel_blocks(x.size(0), kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      forward_row(norm, x.ptr<float>() + row * dim, w, b, y.ptr<float>() + row * dim, stats.ptr<float>() + 2 * row, dim);
    }
  });
  return y;
}

void norm_backward(const Norm& norm, const TensorView& x, const TensorView& stats, const TensorView& dy, const TensorView& dx) {
  const std::int64_t dim = x.size(1), blocks = (x.size(0) + kRows - 1) / kRows;
  const float* w = norm.weight->value.ptr<float>();
  Tensor partial(DType::kF32, {blocks, 2, dim});  // sums of dw and db by block of rows, added up in order below
  parallel_blocks(x.size(0), kRows, [&](std::int64_t begin, std::int64_t end) {
    float* sums = partial.ptr<float>() + begin / kRows * 2 * dim;
    for (std::int64_t row = begin; row < end; ++row) {
      backward_row(norm, x.ptr<float>() + row * dim, w, stats.ptr<float>() + 2 * row, dy.ptr<float>() + row * dim,
                   dx.ptr<float>() + row * dim, sums, sums + dim, dim);
    }
  });
  for (std::int64_t block = 0; block < blocks; ++block) {
    const float* sums = partial.ptr<float>() + block * 2 * dim;
    add_row(sums, norm.weight->gradient.ptr<float>(), dim);
    if (norm.bias != nullptr) add_row(sums + dim, norm.bias->gradient.ptr<float>(), dim);
  }
}

}  // namespace dattn
