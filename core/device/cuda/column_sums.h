// Sums over rows for every column, in a fixed order: by blocks of 64 rows, then the blocks ascending.
#pragma once

#include "core/device/cuda/loops.h"
#include "core/device/cuda/scratch.h"

namespace dattn::cuda {

constexpr std::int64_t kSumRows = 64;  // of one block

template <class Value>
struct BlockSums {
  Value value;
  std::int64_t rows, columns;
  float* sums;  // [blocks, columns]
  __device__ void operator()(std::int64_t i) const {
    const std::int64_t begin = i / columns * kSumRows, end = begin + kSumRows < rows ? begin + kSumRows : rows;
    float sum = 0.0f;
    for (std::int64_t row = begin; row < end; ++row) sum += value(row, i % columns);
    sums[i] = sum;
  }
};

struct AddBlocks {
  const float* partial;
  std::int64_t blocks, columns;
  float* sums;
  __device__ void operator()(std::int64_t j) const {
    for (std::int64_t block = 0; block < blocks; ++block) sums[j] += partial[block * columns + j];
  }
};

// sums[j] += the sum over rows of value(row, j), a struct with a __device__ call operator.
template <class Value>
void add_column_sums(std::int64_t rows, std::int64_t columns, const Value& value, float* sums, NativeStream stream) {
  const std::int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  if (rows * columns == 0) return;
  const Scratch partial(static_cast<std::size_t>(blocks * columns) * sizeof(float), stream);
  for_each(blocks * columns, stream, BlockSums<Value>{value, rows, columns, partial.ptr<float>()});
  for_each(columns, stream, AddBlocks{partial.ptr<float>(), blocks, columns, sums});
}

}  // namespace dattn::cuda
