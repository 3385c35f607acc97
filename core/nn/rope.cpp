#include "core/nn/rope.h"

#include <cmath>

#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 16;  // token rows of one block

// One token row: x [H, D], cosines and sines [D/2].
template <class T>
DATTN_VECTORIZED void turn_row(T* x, const float* cosines, const float* sines, std::int64_t heads, std::int64_t half,
                               float sign) {
  for (std::int64_t head = 0; head < heads; ++head) {
    T* __restrict low = x + head * 2 * half;
    T* __restrict high = low + half;
    for (std::int64_t i = 0; i < half; ++i) {
      const float a = load(low[i]), b = load(high[i]), c = cosines[i], s = sign * sines[i];
      store(low[i], a * c - b * s);
      store(high[i], b * c + a * s);
    }
  }
}

template <class T>
void turn(const TensorView& x, const TensorView& table, float sign) {
  const std::int64_t seq = x.size(1), heads = x.size(2), dim = x.size(3);
  parallel_blocks(x.size(0) * seq, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float* angles = table.ptr<float>() + row % seq * dim;
      turn_row(x.ptr<T>() + row * heads * dim, angles, angles + dim / 2, heads, dim / 2, sign);
    }
  });
}

}  // namespace

Tensor rope_table(std::span<const std::int64_t> positions, std::int64_t head_dim, double base) {
  const auto rows = static_cast<std::int64_t>(positions.size());
  const std::int64_t half = head_dim / 2;
  const Device wanted = current_device();
  const DeviceScope host(Device{});
  Tensor table = Tensor::uninitialized(DType::kF32, {rows, head_dim});
  for (std::int64_t i = 0; i < half; ++i) {
    const double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    for (std::int64_t row = 0; row < rows; ++row) {
      const double angle = static_cast<double>(positions[static_cast<std::size_t>(row)]) * frequency;
      table.ptr<float>()[row * head_dim + i] = static_cast<float>(std::cos(angle));
      table.ptr<float>()[row * head_dim + half + i] = static_cast<float>(std::sin(angle));
    }
  }
  return wanted.is_cuda() ? to_device(table, wanted) : std::move(table);
}

void rope_apply(const TensorView& x, const TensorView& table, bool inverse) {
  if (on_cuda({&x, &table})) return cuda_nn().rope(x, table, inverse, cuda_stream());
  with_number(x.dtype, [&](auto zero) { turn<decltype(zero)>(x, table, inverse ? -1.0f : 1.0f); });
}

}  // namespace dattn
