// Column sums on the device (see linear.h): by blocks of rows, added up in ascending order.
#include "core/device/cuda/loops.h"
#include "core/device/cuda/number.h"
#include "core/device/cuda/scratch.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

constexpr std::int64_t kRows = 64;  // rows of one block of sums

template <class T>
struct BlockSums {
  const T* x;
  std::int64_t rows, columns, stride;
  float* sums;  // [blocks, M]
  __device__ void operator()(std::int64_t i) const {
    const std::int64_t begin = i / columns * kRows, end = begin + kRows < rows ? begin + kRows : rows;
    float sum = 0.0f;
    for (std::int64_t row = begin; row < end; ++row) sum += load(x[row * stride + i % columns]);
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

}  // namespace

void column_sums(const TensorView& x, const TensorView& sums, NativeStream stream) {
  const std::int64_t rows = x.size(0), columns = x.size(1), blocks = (rows + kRows - 1) / kRows;
  if (rows * columns == 0) return;
  const Scratch partial(static_cast<std::size_t>(blocks * columns) * sizeof(float), stream);
  with_number(x.dtype, [&]<class T>(T) {
    for_each(blocks * columns, stream, BlockSums<T>{x.ptr<T>(), rows, columns, x.stride(0), partial.ptr<float>()});
  });
  for_each(columns, stream, AddBlocks{partial.ptr<float>(), blocks, columns, sums.ptr<float>()});
}

}  // namespace dattn::cuda
