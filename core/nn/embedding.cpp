#include "core/nn/embedding.h"

#include <cstring>

#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 64;     // rows of one block
constexpr std::int64_t kColumns = 64;  // features whose sums one thread carries

DATTN_VECTORIZED void add_row(const float* from, float* to, std::int64_t dim) {
  for (std::int64_t j = 0; j < dim; ++j) to[j] += from[j];
}

// gradient[index(row)] += dx[row], in row order whatever the number of threads; rows of a negative index are left out.
template <class Index>
void scatter_add(const TensorView& dx, const TensorView& gradient, const Index& index) {
  const std::int64_t dim = dx.size(1);
  parallel_blocks(dim, kColumns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = 0; row < dx.size(0); ++row) {
      const std::int64_t target = index(row);
      if (target >= 0) add_row(dx.ptr<float>() + row * dim + begin, gradient.ptr<float>() + target * dim + begin, end - begin);
    }
  });
}

// The row of the slice that a token has, or -1.
std::int64_t slice_row(const Parameter& table, std::int64_t token) {
  return token >= table.held.begin && token < table.held.end ? token - table.held.begin : -1;
}

}  // namespace

Tensor embedding_forward(const Parameter& table, std::span<const std::int32_t> tokens) {
  const std::int64_t dim = table.global_shape[1], count = static_cast<std::int64_t>(tokens.size());
  Tensor x = Tensor::uninitialized(DType::kF32, {count, dim});
  const auto bytes = static_cast<std::size_t>(dim) * sizeof(float);
  parallel_blocks(count, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t source = slice_row(table, tokens[static_cast<std::size_t>(row)]);
      float* place = x.ptr<float>() + row * dim;
      if (source >= 0)
        std::memcpy(place, table.value.ptr<float>() + source * dim, bytes);
      else
        std::memset(place, 0, bytes);
    }
  });
  return x;
}

void embedding_backward(Parameter& table, std::span<const std::int32_t> tokens, const TensorView& dx) {
  scatter_add(dx, table.gradient, [&](std::int64_t row) { return slice_row(table, tokens[static_cast<std::size_t>(row)]); });
}

void position_forward(const Parameter& table, const TokenRows& rows, const TensorView& x) {
  const std::int64_t dim = x.size(1);
  parallel_blocks(rows.count, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      add_row(table.value.ptr<float>() + rows.position(row) * dim, x.ptr<float>() + row * dim, dim);
    }
  });
}

void position_backward(Parameter& table, const TokenRows& rows, const TensorView& dx) {
  scatter_add(dx, table.gradient, [&](std::int64_t row) { return rows.position(row); });
}

}  // namespace dattn
