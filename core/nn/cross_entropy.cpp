#include "core/nn/cross_entropy.h"

#include <cmath>
#include <limits>

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

DATTN_VECTORIZED void scale_row(float* x, std::int64_t count, float factor) {
  for (std::int64_t j = 0; j < count; ++j) x[j] *= factor;
}

}  // namespace

double cross_entropy(const TensorView& logits, std::int64_t vocab_begin, std::span<const std::int32_t> targets, double scale,
                     VocabularyReduction& reduction, bool gradient) {
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

  double total = 0.0;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (target_of(row) >= 0) total += std::log(static_cast<double>(sum[row])) - static_cast<double>(sum[rows + row]);
  }
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
