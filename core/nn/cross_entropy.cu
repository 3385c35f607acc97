// The rows of a cross-entropy on the device (see cross_entropy.h): a warp for each row.
#include "core/device/cuda/loops.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

struct Maxima {
  const float* logits;
  std::int64_t vocab;
  float* maxima;
  __device__ void operator()(std::int64_t row, int lane) const {
    float largest = -INFINITY;
    for (std::int64_t j = lane; j < vocab; j += 32) largest = fmaxf(largest, logits[row * vocab + j]);
    largest = warp_max(largest);
    if (lane == 0) maxima[row] = largest;
  }
};

struct Exponentials {
  float* logits;
  const float* maxima;
  const std::int32_t* targets;
  std::int64_t first, rows, vocab;
  float* sums;
  __device__ void operator()(std::int64_t row, int lane) const {
    float* own = logits + row * vocab;
    const std::int64_t target = targets[row] - first;
    const float largest = maxima[row];
    if (lane == 0) sums[rows + row] = targets[row] >= 0 && target >= 0 && target < vocab ? own[target] - largest : 0.0f;
    __syncwarp();
    float sum = 0.0f;
    for (std::int64_t j = lane; j < vocab; j += 32) {
      own[j] = expf(own[j] - largest);
      sum += own[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[row] = sum;
  }
};

struct Gradients {
  float* logits;
  const float* sums;
  const std::int32_t* targets;
  std::int64_t first, vocab;
  float scale;
  __device__ void operator()(std::int64_t row, int lane) const {
    float* own = logits + row * vocab;
    const std::int64_t target = targets[row] >= 0 ? targets[row] - first : -1;
    const float factor = targets[row] >= 0 ? scale : 0.0f;
    for (std::int64_t j = lane; j < vocab; j += 32) own[j] = own[j] * (factor / sums[row]) - (j == target ? factor : 0.0f);
  }
};

}  // namespace

void row_maxima(const TensorView& logits, const TensorView& maxima, NativeStream stream) {
  for_each_row(logits.size(0), stream, Maxima{logits.ptr<float>(), logits.size(1), maxima.ptr<float>()});
}

void row_exponentials(const TensorView& logits, const TensorView& maxima, const std::int32_t* targets, std::int64_t first,
                      const TensorView& sums, NativeStream stream) {
  for_each_row(logits.size(0), stream,
               Exponentials{logits.ptr<float>(), maxima.ptr<float>(), targets, first, logits.size(0), logits.size(1),
                            sums.ptr<float>()});
}

void logit_gradients(const TensorView& logits, const TensorView& sums, const std::int32_t* targets, std::int64_t first, float scale,
                     NativeStream stream) {
  for_each_row(logits.size(0), stream,
               Gradients{logits.ptr<float>(), sums.ptr<float>(), targets, first, logits.size(1), scale});
}

}  // namespace dattn::cuda
