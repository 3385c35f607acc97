// Column sums on the device (see linear.h).
#include "core/device/cuda/column_sums.h"
#include "core/device/cuda/number.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

template <class T>
struct Element {
  const T* x;
  std::int64_t stride;
  __device__ float operator()(std::int64_t row, std::int64_t j) const { return load(x[row * stride + j]); }
};

}  // namespace

void column_sums(const TensorView& x, const TensorView& sums, NativeStream stream) {
  with_number(x.dtype, [&]<class T>(T) {
    add_column_sums(x.size(0), x.size(1), Element<T>{x.ptr<T>(), x.stride(0)}, sums.ptr<float>(), stream);
  });
}

}  // namespace dattn::cuda
