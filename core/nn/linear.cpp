#include "core/nn/linear.h"

#include <algorithm>

#include "core/nn/activation.h"
#include "core/nn/matmul.h"
#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kColumns = 64;   // features whose sums one thread carries
constexpr std::int64_t kBlock = 16384;  // elements converted at a time

// What is multiplied at a time with a tree. They shape products: other values, other bits.
constexpr std::int64_t kLeafColumns = 256;                          // outputs
constexpr std::int64_t kWeightBlock = 65536;                        // elements of a weight's gradient
constexpr std::int64_t kDeviceWeightBlock = std::int64_t{1} << 24;  // of a device: 64 MB, and as much for each level of a tree

template <class T>
DATTN_VECTORIZED void round_block(const float* from, T* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

template <class T>
DATTN_VECTORIZED void sum_block(const T* x, std::int64_t rows, std::int64_t row_stride, float* sums, std::int64_t columns) {
  float total[kColumns] = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t j = 0; j < columns; ++j) total[j] += load(x[row * row_stride + j]);
  }
  for (std::int64_t j = 0; j < columns; ++j) sums[j] += total[j];
}

template <class T>
void column_sums(const TensorView& x, const TensorView& sums, const RowTree& tree) {
  parallel_blocks(x.size(1), kColumns, [&](std::int64_t begin, std::int64_t end) {
    const auto sum_rows = [&](Interval rows, float* to) {
      sum_block(x.ptr<T>() + rows.begin * x.stride(0) + begin, rows.count(), x.stride(0), to, end - begin);
    };
    if (tree.empty()) return sum_rows({0, x.size(0)}, sums.ptr<float>() + begin);
    const Tensor total = Tensor::uninitialized(DType::kF32, {end - begin});
    tree_sum(0, tree.leaves.size(), total, [&](std::size_t i, const TensorView& to, bool accumulate) {
      if (!accumulate) fill_zero(to);
      sum_rows(tree.leaves[i], to.ptr<float>());
    });
    add_contiguous(total, sums.slice(0, begin, end - begin));
  });
}

// On the device, leaf by leaf: this thread's stream has them in order.
void column_sums_on_cuda(const TensorView& x, const TensorView& sums, const RowTree& tree) {
  if (tree.empty()) return cuda_nn().column_sums(x, sums, cuda_stream());
  const Tensor total = Tensor::uninitialized(DType::kF32, sums.shape);
  tree_sum(0, tree.leaves.size(), total, [&](std::size_t i, const TensorView& to, bool accumulate) {
    if (!accumulate) fill_zero(to);
    cuda_nn().column_sums(x.slice(0, tree.leaves[i].begin, tree.leaves[i].count()), to, cuda_stream());
  });
  add_contiguous(total, sums);
}

// y [rows, columns] = x w (+ bias), or += without, in pieces of one leaf's rows and some columns: fixed shapes, each on one
// thread. Blocks of columns, so that a single leaf keeps all threads busy; a device takes them all at once.
void leaf_products(const RowTree& tree, const TensorView& x, const TensorView& w, const TensorView& y,
                   const MatmulOptions& options) {
  const auto leaves = static_cast<std::int64_t>(tree.leaves.size());
  const std::int64_t columns = y.size(1), blocks = (columns + kLeafColumns - 1) / kLeafColumns;
  const auto multiply = [&](Interval rows, std::int64_t begin, std::int64_t count) {
    MatmulOptions mine = options;
    mine.fixed = true;
    if (mine.bias != nullptr) mine.bias += begin;
    matmul(x.slice(0, rows.begin, rows.count()), w.slice(1, begin, count),
           y.slice(0, rows.begin, rows.count()).slice(1, begin, count), mine);
  };
  if (y.device.is_cuda()) {
    for (const Interval& rows : tree.leaves) multiply(rows, 0, columns);
    return;
  }
  parallel_for(leaves * blocks, [&](std::int64_t i) {
    const std::int64_t begin = i % blocks * kLeafColumns;
    multiply(tree.leaves[static_cast<std::size_t>(i / blocks)], begin, std::min(kLeafColumns, columns - begin));
  });
}

// Calls body(begin, count) for blocks of rows of a weight [out, in]: as many as leave the sums of all levels of a tree in a
// core's second-level cache, or do not fill a device.
template <class Body>
void for_weight_blocks(const TensorView& weight, const Body& body) {
  const std::int64_t rows = weight.size(0), columns = std::max<std::int64_t>(1, weight.size(1));
  if (weight.device.is_cuda()) {
    const std::int64_t block = std::max<std::int64_t>(kDeviceWeightBlock / columns, 64) / 64 * 64;
    for (std::int64_t begin = 0; begin < rows; begin += block) body(begin, std::min(block, rows - begin));
    return;
  }
  const std::int64_t block = std::clamp<std::int64_t>(kWeightBlock / columns, 16, 64);
  parallel_blocks(rows, block, [&](std::int64_t begin, std::int64_t end) { body(begin, end - begin); });
}

TensorView weight_in(const Linear& layer, DType type, Tensor& storage) {
  const Tensor& rounded = layer.weight->rounded;
  return rounded.defined() && rounded->dtype == type ? rounded.view() : as_compute(layer.weight->value, type, storage);
}

const float* bias_of(const Linear& layer) { return layer.bias != nullptr ? layer.bias->value.ptr<float>() : nullptr; }

}  // namespace

TensorView as_compute(const TensorView& x, DType type, Tensor& storage) {
  if (x.dtype == type) return x;
  storage = Tensor::uninitialized(type, x.shape);
  if (x.dtype == DType::kF32 && is_half(type) && x.contiguous() && !x.device.is_cuda()) {
    with_number(type, [&](auto zero) {
      auto* to = storage.ptr<decltype(zero)>();
      parallel_blocks(x.elements(), kBlock, [&](std::int64_t begin, std::int64_t end) {
        round_block(x.ptr<float>() + begin, to + begin, end - begin);
      });
    });
  } else {
    copy(x, storage);
  }
  return storage;
}

Tensor to_compute(Tensor x, DType type) {
  Tensor storage;
  as_compute(x, type, storage);
  return storage.defined() ? std::move(storage) : std::move(x);
}

void add_column_sums(const TensorView& x, const TensorView& sums, const RowTree& tree) {
  if (on_cuda({&x, &sums})) return column_sums_on_cuda(x, sums, tree);
  with_number(x.dtype, [&](auto zero) { column_sums<decltype(zero)>(x, sums, tree); });
}

void leaf_product(const TensorView& dy, const TensorView& x, const TensorView& to, bool accumulate) {
  for_weight_blocks(to, [&](std::int64_t begin, std::int64_t count) {
    matmul(dy.slice(1, begin, count).transpose(0, 1), x, to.slice(0, begin, count), {.accumulate = accumulate, .fixed = true});
  });
}

Tensor linear_gelu_forward(const Linear& layer, const TensorView& x, DType result, Tensor& y, const RowTree& tree) {
  if (!tree.empty()) {
    y = linear_forward(layer, x, result, tree);
    return gelu_forward(y);
  }
  Tensor rounded;
  const TensorView weight = weight_in(layer, x.dtype, rounded);
  y = Tensor::uninitialized(result, {x.size(0), weight.size(0)});
  Tensor a = Tensor::uninitialized(result, y->shape);
  matmul(x, weight.transpose(0, 1), a, {.bias = bias_of(layer), .before_gelu = &y.view()});
  return a;
}

Tensor linear_forward(const Linear& layer, const TensorView& x, DType result, const RowTree& tree) {
  Tensor rounded;
  const TensorView weight = weight_in(layer, x.dtype, rounded);
  Tensor y = Tensor::uninitialized(result, {x.size(0), weight.size(0)});
  const MatmulOptions options{.bias = bias_of(layer)};
  if (tree.empty())
    matmul(x, weight.transpose(0, 1), y, options);
  else
    leaf_products(tree, x, weight.transpose(0, 1), y, options);
  return y;
}

void linear_backward_weights(const Linear& layer, const TensorView& x, const TensorView& dy, const RowTree& tree,
                             bool accumulate) {
  if (layer.bias != nullptr) add_column_sums(dy, layer.bias->gradient, tree);
  const TensorView& gradient = layer.weight->gradient;
  if (tree.empty()) return matmul(dy.transpose(0, 1), x, gradient, {.accumulate = accumulate});
  for_weight_blocks(gradient, [&](std::int64_t begin, std::int64_t count) {
    const Tensor total = Tensor::uninitialized(DType::kF32, {count, gradient.size(1)});
    tree_sum(0, tree.leaves.size(), total, [&](std::size_t i, const TensorView& to, bool onto) {
      const Interval rows = tree.leaves[i];
      matmul(dy.slice(0, rows.begin, rows.count()).slice(1, begin, count).transpose(0, 1), x.slice(0, rows.begin, rows.count()),
             to, {.accumulate = onto, .fixed = true});
    });
    add_contiguous(total, gradient.slice(0, begin, count));
  });
}

void linear_backward_input(const Linear& layer, const TensorView& dy, const TensorView& dx, bool accumulate,
                           const RowTree& tree) {
  Tensor rounded;
  const TensorView weight = weight_in(layer, dy.dtype, rounded);
  if (tree.empty())
    matmul(dy, weight, dx, {.accumulate = accumulate});
  else
    leaf_products(tree, dy, weight, dx, {.accumulate = accumulate});
}

}  // namespace dattn
