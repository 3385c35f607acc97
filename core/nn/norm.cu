// LayerNorm and RMSNorm on the device (see norm.h): a warp for each row.
#include "core/device/cuda/column_sums.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

struct Forward {
  const float *x, *w, *b;
  bool centered;
  float epsilon;
  std::int64_t dim;
  float *y, *stats;

  __device__ void operator()(std::int64_t row, int lane) const {
    const float* from = x + row * dim;
    float mean = 0.0f;
    if (centered) {
      for (std::int64_t j = lane; j < dim; j += 32) mean += from[j];
      mean = warp_sum(mean) / static_cast<float>(dim);
    }
    float variance = 0.0f;
    for (std::int64_t j = lane; j < dim; j += 32) variance += (from[j] - mean) * (from[j] - mean);
    const float scale = 1.0f / sqrtf(warp_sum(variance) / static_cast<float>(dim) + epsilon);
    if (lane == 0) {
      stats[2 * row] = mean;
      stats[2 * row + 1] = scale;
    }
    for (std::int64_t j = lane; j < dim; j += 32) {
      y[row * dim + j] = (from[j] - mean) * scale * w[j] + (b != nullptr ? b[j] : 0.0f);
    }
  }
};

// With n = (x - mean) scale and g = dy w: dx += scale (g - mean(g) - n mean(g n)), without mean(g) for rmsnorm.
struct InputGradient {
  const float *x, *stats, *w, *dy;
  bool centered;
  std::int64_t dim;
  float* dx;

  __device__ void operator()(std::int64_t row, int lane) const {
    const float *from = x + row * dim, *grad = dy + row * dim;
    const float mean = stats[2 * row], scale = stats[2 * row + 1];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (std::int64_t j = lane; j < dim; j += 32) {
      const float g = grad[j] * w[j];
      sum_g += g;
      sum_gn += g * (from[j] - mean) * scale;
    }
    const float mean_g = centered ? warp_sum(sum_g) / static_cast<float>(dim) : 0.0f;
    const float mean_gn = warp_sum(sum_gn) / static_cast<float>(dim);
    for (std::int64_t j = lane; j < dim; j += 32) {
      const float n = (from[j] - mean) * scale;
      dx[row * dim + j] += scale * (grad[j] * w[j] - mean_g - n * mean_gn);
    }
  }
};

// What an element adds to the gradient of weight (dy n) and of bias (dy).
struct WeightGradient {
  const float *x, *stats, *dy;
  std::int64_t dim;
  __device__ float operator()(std::int64_t row, std::int64_t j) const {
    return dy[row * dim + j] * (x[row * dim + j] - stats[2 * row]) * stats[2 * row + 1];
  }
};

struct BiasGradient {
  const float* dy;
  std::int64_t dim;
  __device__ float operator()(std::int64_t row, std::int64_t j) const { return dy[row * dim + j]; }
};

}  // namespace

void norm(const TensorView& x, const float* w, const float* b, bool centered, float epsilon, const TensorView& y,
          const TensorView& stats, NativeStream stream) {
  for_each_row(x.size(0), stream,
               Forward{x.ptr<float>(), w, b, centered, epsilon, x.size(1), y.ptr<float>(), stats.ptr<float>()});
}

void norm_backward(const TensorView& x, const TensorView& stats, const float* w, bool centered, const TensorView& dy,
                   const TensorView& dx, float* dw, float* db, NativeStream stream) {
  const std::int64_t rows = x.size(0), dim = x.size(1);
  const float *from = x.ptr<float>(), *statistics = stats.ptr<float>(), *grad = dy.ptr<float>();
  for_each_row(rows, stream, InputGradient{from, statistics, w, grad, centered, dim, dx.ptr<float>()});
  add_column_sums(rows, dim, WeightGradient{from, statistics, grad, dim}, dw, stream);
  if (db != nullptr) add_column_sums(rows, dim, BiasGradient{grad, dim}, db, stream);
}

}  // namespace dattn::cuda
