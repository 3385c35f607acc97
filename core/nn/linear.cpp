#include "core/nn/linear.h"

#include "core/nn/matmul.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kColumns = 64;   // features whose sums one thread carries
constexpr std::int64_t kBlock = 16384;  // elements converted at a time

DATTN_VECTORIZED void round_block(const float* from, BFloat16* to, std::int64_t count) {
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
void column_sums(const TensorView& x, const TensorView& sums) {
  parallel_blocks(x.size(1), kColumns, [&](std::int64_t begin, std::int64_t end) {
    sum_block(x.ptr<T>() + begin, x.size(0), x.stride(0), sums.ptr<float>() + begin, end - begin);
  });
}

}  // namespace

TensorView as_compute(const TensorView& x, DType type, Tensor& storage) {
  if (x.dtype == type) return x;
  storage = Tensor::uninitialized(type, x.shape);
  if (x.dtype == DType::kF32 && type == DType::kBF16 && x.contiguous()) {
    parallel_blocks(x.elements(), kBlock, [&](std::int64_t begin, std::int64_t end) {
      round_block(x.ptr<float>() + begin, storage.ptr<BFloat16>() + begin, end - begin);
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

void add_column_sums(const TensorView& x, const TensorView& sums) {
  if (x.dtype == DType::kBF16)
    column_sums<BFloat16>(x, sums);
  else
    column_sums<float>(x, sums);
}

Tensor linear_forward(const Linear& layer, const TensorView& x, DType result) {
  Tensor rounded;
  const TensorView weight = as_compute(layer.weight->value, x.dtype, rounded);
  Tensor y = Tensor::uninitialized(result, {x.size(0), weight.size(0)});
  matmul(x, weight.transpose(0, 1), y, {.bias = layer.bias != nullptr ? layer.bias->value.ptr<float>() : nullptr});
  return y;
}

void linear_backward_weights(const Linear& layer, const TensorView& x, const TensorView& dy) {
  matmul(dy.transpose(0, 1), x, layer.weight->gradient, {.accumulate = true});
  if (layer.bias != nullptr) add_column_sums(dy, layer.bias->gradient);
}

void linear_backward_input(const Linear& layer, const TensorView& dy, const TensorView& dx, bool accumulate) {
  Tensor rounded;
  matmul(dy, as_compute(layer.weight->value, dy.dtype, rounded), dx, {.accumulate = accumulate});
}

}  // namespace dattn
