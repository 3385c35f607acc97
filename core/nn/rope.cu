// Rotary positions on the device (see rope.h).
#include "core/device/cuda/loops.h"
#include "core/device/cuda/number.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

template <class T>
struct Turn {
  T* x;
  const float* table;
  std::int64_t seq, heads, half;
  float sign;

  __device__ void operator()(std::int64_t i) const {  // i = (token row, head, pair of features)
    const std::int64_t pair = i % half, head = i / half % heads, row = i / half / heads;
    const float* angles = table + row % seq * 2 * half;
    T& low = x[(row * heads + head) * 2 * half + pair];
    T& high = *(&low + half);
    const float a = load(low), b = load(high), c = angles[pair], s = sign * angles[half + pair];
    store(low, a * c - b * s);
    store(high, b * c + a * s);
  }
};

}  // namespace

void rope(const TensorView& x, const TensorView& table, bool inverse, NativeStream stream) {
  const float sign = inverse ? -1.0f : 1.0f;
  with_number(x.dtype, [&]<class T>(T) {
    for_each(x.elements() / 2, stream, Turn<T>{x.ptr<T>(), table.ptr<float>(), x.size(1), x.size(2), x.size(3) / 2, sign});
  });
}

}  // namespace dattn::cuda
