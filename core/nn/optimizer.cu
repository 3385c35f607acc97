// AdamW and the norm of gradients on the device (see optimizer.h).
#include "core/device/cuda/loops.h"
#include "core/device/cuda/scratch.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

constexpr std::int64_t kBlock = 256;  // numbers that one thread adds up

struct Update {
  CudaAdamW u;
  const float* gradient;
  float *m, *v, *value;
  __device__ void operator()(std::int64_t i) const {
    const float g = gradient[i] * u.gradient_scale;
    m[i] = u.beta1 * m[i] + (1.0f - u.beta1) * g;
    v[i] = u.beta2 * v[i] + (1.0f - u.beta2) * g * g;
    value[i] = value[i] * u.decay - u.rate * (m[i] * u.correction1) / (sqrtf(v[i] * u.correction2) + u.epsilon);
  }
};

struct Squares {
  const float* x;
  std::int64_t rows, columns, stride;
  double* partial;
  __device__ void operator()(std::int64_t block) const {
    const std::int64_t begin = block * kBlock, count = rows * columns, end = begin + kBlock < count ? begin + kBlock : count;
    double sum = 0.0;
    for (std::int64_t i = begin; i < end; ++i) {
      const double value = x[i / columns * stride + i % columns];
      sum += value * value;
    }
    partial[block] = sum;
  }
};

struct Sums {
  const double* x;
  std::int64_t count;
  double* sums;
  __device__ void operator()(std::int64_t block) const {
    const std::int64_t end = (block + 1) * kBlock < count ? (block + 1) * kBlock : count;
    double sum = 0.0;
    for (std::int64_t i = block * kBlock; i < end; ++i) sum += x[i];
    sums[block] = sum;
  }
};

}  // namespace

void adamw(const CudaAdamW& update, const TensorView& gradient, const TensorView& m, const TensorView& v, const TensorView& value,
           NativeStream stream) {
  for_each(value.elements(), stream,
           Update{update, gradient.ptr<float>(), m.ptr<float>(), v.ptr<float>(), value.ptr<float>()});
}

void squared_norm(const TensorView& x, const TensorView& sum, NativeStream stream) {
  const std::int64_t rows = x.axes() == 1 ? 1 : x.size(0), columns = rows == 0 ? 0 : x.elements() / rows;
  const std::int64_t blocks = (rows * columns + kBlock - 1) / kBlock, stride = x.axes() == 1 ? columns : x.stride(0);
  const Scratch scratch(static_cast<std::size_t>(2 * blocks + 2) * sizeof(double), stream);
  double *partial = scratch.ptr<double>(), *next = partial + blocks + 1;
  for_each(std::max<std::int64_t>(blocks, 1), stream, Squares{x.ptr<float>(), rows, columns, stride, partial});
  for (std::int64_t count = blocks; count > 1; std::swap(partial, next)) {
    const std::int64_t fewer = (count + kBlock - 1) / kBlock;
    for_each(fewer, stream, Sums{partial, count, next});
    count = fewer;
  }
  for_each(1, stream, Sums{partial, 1, sum.ptr<double>()});
}

}  // namespace dattn::cuda
