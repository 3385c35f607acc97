#include "core/nn/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/nn/linear.h"
#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 64;  // rows of one block

template <class T>
DATTN_VECTORIZED void forward_row(const Norm& norm, const float* x, const float* w, const float* b, T* y, float* stats,
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
    for (std::int64_t j = 0; j < dim; ++j) store(y[j], (x[j] - mean) * scale * w[j] + b[j]);
  } else {
    for (std::int64_t j = 0; j < dim; ++j) store(y[j], (x[j] - mean) * scale * w[j]);
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

// By the leaves of a tree on the device, whose kernel takes rows by themselves and adds up the columns of those it is given.
void backward_on_cuda(const Norm& norm, const TensorView& x, const TensorView& stats, const TensorView& dy,
                      const TensorView& dx, const RowTree& tree) {
  const float* w = norm.weight->value.ptr<float>();
  const auto take = [&](Interval rows, float* dw, float* db) {
    const auto part = [&](const TensorView& whole) { return whole.slice(0, rows.begin, rows.count()); };
    cuda_nn().norm_backward(part(x), part(stats), w, norm.centered, part(dy), part(dx), dw, norm.bias != nullptr ? db : nullptr,
                            cuda_stream());
  };
  if (tree.empty()) {
    return take({0, x.size(0)}, norm.weight->gradient.ptr<float>(),
                norm.bias != nullptr ? norm.bias->gradient.ptr<float>() : nullptr);
  }
  const std::int64_t dim = x.size(1);
  const Tensor total(DType::kF32, {2, dim});  // of dw and db
  tree_sum(0, tree.leaves.size(), total, [&](std::size_t i, const TensorView& to, bool accumulate) {
    if (!accumulate) fill_zero(to);
    take(tree.leaves[i], to.ptr<float>(), to.ptr<float>() + dim);
  });
  add_contiguous(total->slice(0, 0, 1).reshape({dim}), norm.weight->gradient);
  if (norm.bias != nullptr) add_contiguous(total->slice(0, 1, 1).reshape({dim}), norm.bias->gradient);
}

std::vector<Interval> blocks_of(std::int64_t rows) {
  std::vector<Interval> blocks;
  for (std::int64_t begin = 0; begin < rows; begin += kRows) blocks.push_back({begin, std::min(rows, begin + kRows)});
  return blocks;
}

}  // namespace

Tensor norm_forward(const Norm& norm, const TensorView& x, const TensorView& stats, DType result) {
  const std::int64_t dim = x.size(1);
  const float* w = norm.weight->value.ptr<float>();
  const float* b = norm.bias != nullptr ? norm.bias->value.ptr<float>() : nullptr;
  if (on_cuda({&x, &stats, &norm.weight->value.view()})) {
    Tensor y = Tensor::uninitialized(DType::kF32, x.shape);
    cuda_nn().norm(x, w, b, norm.centered, norm.epsilon, y, stats, cuda_stream());
    return to_compute(std::move(y), result);
  }
  Tensor y = Tensor::uninitialized(result, x.shape);
  with_number(result, [&](auto zero) {
    auto* to = y.ptr<decltype(zero)>();
    parallel_blocks(x.size(0), kRows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row)
        forward_row(norm, x.ptr<float>() + row * dim, w, b, to + row * dim, stats.ptr<float>() + 2 * row, dim);
    });
  });
  return y;
}

void norm_backward(const Norm& norm, const TensorView& x, const TensorView& stats, const TensorView& dy, const TensorView& dx,
                   const RowTree& tree) {
  const std::int64_t dim = x.size(1);
  const float* w = norm.weight->value.ptr<float>();
  if (on_cuda({&x, &stats, &dy, &dx, &norm.weight->value.view()})) return backward_on_cuda(norm, x, stats, dy, dx, tree);
  const std::vector<Interval> blocks = tree.empty() ? blocks_of(x.size(0)) : tree.leaves;
  const auto count = static_cast<std::int64_t>(blocks.size());
  Tensor partial(DType::kF32, {count, 2, dim});  // sums of dw and db by block of rows
  parallel_for(count, [&](std::int64_t block) {
    float* sums = partial.ptr<float>() + block * 2 * dim;
    const Interval rows = blocks[static_cast<std::size_t>(block)];
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      backward_row(norm, x.ptr<float>() + row * dim, w, stats.ptr<float>() + 2 * row, dy.ptr<float>() + row * dim,
                   dx.ptr<float>() + row * dim, sums, sums + dim, dim);
    }
  });
  const auto add_to_gradients = [&](const float* sums) {
    add_row(sums, norm.weight->gradient.ptr<float>(), dim);
    if (norm.bias != nullptr) add_row(sums + dim, norm.bias->gradient.ptr<float>(), dim);
  };
  if (tree.empty()) {
    for (std::int64_t block = 0; block < count; ++block) add_to_gradients(partial.ptr<float>() + block * 2 * dim);
    return;
  }
  const Tensor total(DType::kF32, {2, dim});
  tree_sum(0, blocks.size(), total, [&](std::size_t i, const TensorView& to, bool accumulate) {
    if (!accumulate) fill_zero(to);
    add_row(partial.ptr<float>() + static_cast<std::int64_t>(i) * 2 * dim, to.ptr<float>(), 2 * dim);
  });
  add_to_gradients(total.ptr<float>());
}

}  // namespace dattn
