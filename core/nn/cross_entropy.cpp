#include "core/nn/cross_entropy.h"

#include <cmath>
#include <limits>

#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 16;  // rows of one block

DATTN_VECTORIZED float row_maximum(const float* logits, std::int64_t vocab) {
  float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
  for (std::int64_t j = 0; j < vocab; ++j) maximum = logits[j] > maximum ? logits[j] : maximum;
  return maximum;
}

// logits := exp(logits - maximum); returns their sum.
DATTN_VECTORIZED float row_exponentials(float* logits, std::int64_t vocab, float maximum) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < vocab; ++j) {
    logits[j] = fast_exp(logits[j] - maximum);
    sum += logits[j];
  }
  return sum;
}

// sums [2, n]: of exponentials; the targets' logits less the maxima.
double total_loss(const float* sums, std::span<const std::int32_t> targets) {
  double total = 0.0;
  for (std::size_t row = 0; row < targets.size(); ++row) {
    if (targets[row] >= 0) total += std::log(static_cast<double>(sums[row])) - static_cast<double>(sums[targets.size() + row]);
  }
  return total;
}

DATTN_VECTORIZED void scale_row(float* x, std::int64_t count, float factor) {
  for (std::int64_t j = 0; j < count; ++j) x[j] *= factor;
}

double cross_entropy_on_cuda(const TensorView& logits, std::int64_t vocab_begin, std::span<const std::int32_t> targets,
                             double scale, VocabularyReduction& reduction, bool gradient) {
  const std::int64_t rows = logits.size(0);
  const Tensor wanted = to_device(targets), maxima = Tensor::uninitialized(DType::kF32, {rows});
  const Tensor sums = Tensor::uninitialized(DType::kF32, {2, rows});
  cuda_nn().row_maxima(logits, maxima, cuda_stream());
  reduction.maximum(maxima);
  cuda_nn().row_exponentials(logits, maxima, wanted.ptr<std::int32_t>(), vocab_begin, sums, cuda_stream());
  reduction.sum(sums);
  if (gradient) {
    cuda_nn().logit_gradients(logits, sums, wanted.ptr<std::int32_t>(), vocab_begin, static_cast<float>(scale), cuda_stream());
  }
  return total_loss(to_device(sums, Device{}).ptr<float>(), targets) * scale;
}

}  // namespace

double cross_entropy(const TensorView& logits, std::int64_t vocab_begin, std::span<const std::int32_t> targets, double scale,
                     VocabularyReduction& reduction, bool gradient) {
  if (on_cuda({&logits})) return cross_entropy_on_cuda(logits, vocab_begin, targets, scale, reduction, gradient);
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  const auto row_of = [&](std::int64_t row) { return logits.ptr<float>() + row * vocab; };
  const auto target_of = [&](std::int64_t row) { return targets[static_cast<std::size_t>(row)]; };
  const auto here = [&](std::int64_t row) {  // the target's place in this slice, or -1
    const std::int64_t place = target_of(row) - vocab_begin;
    return target_of(row) >= 0 && place >= 0 && place < vocab ? place : std::int64_t{-1};
  };

  Tensor maxima = Tensor::uninitialized(DType::kF32, {rows});
  float* maximum = maxima.ptr<float>();
  parallel_blocks(rows, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) maximum[row] = row_maximum(row_of(row), vocab);
  });
  reduction.maximum(maxima);

  Tensor sums = Tensor::uninitialized(DType::kF32, {2, rows});  // sum of exp; the target's logit less the maximum
  float* sum = sums.ptr<float>();
  parallel_blocks(rows, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      sum[rows + row] = here(row) >= 0 ? row_of(row)[here(row)] - maximum[row] : 0.0f;
      sum[row] = row_exponentials(row_of(row), vocab, maximum[row]);
    }
  });
  reduction.sum(sums);

  const double total = total_loss(sum, targets);
  if (!gradient) return total * scale;
  parallel_blocks(rows, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float factor = target_of(row) >= 0 ? static_cast<float>(scale) : 0.0f;
      scale_row(row_of(row), vocab, factor / sum[row]);
      if (here(row) >= 0) row_of(row)[here(row)] -= factor;
    }
  });
  return total * scale;
}

}  // namespace dattn
