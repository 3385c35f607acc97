// A plain matrix product on the device, where cuBLASLt is missing: one thread for each element of the result, sums in fp32 in
// ascending order.
#include "core/device/cuda/loops.h"
#include "core/device/cuda/number.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

// A factor, where asked for rounded to the nearest TF32 as tensor cores would have it: 10 bits, ties away from 0.
__device__ __forceinline__ float factor(float x, bool tf32) {
  return tf32 && fabsf(x) < 3e38f ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u) : x;
}
template <class T>
__device__ __forceinline__ float factor(T x, bool /*tf32*/) {
  return load(x);
}

template <class In, class Out>
struct Product {
  const In *a, *b;
  std::int64_t a_row, a_column, b_row, b_column, inner, columns, c_row;
  const float* bias;
  bool accumulate, tf32;
  Out* c;

  __device__ void operator()(std::int64_t i) const {
    const std::int64_t row = i / columns, column = i % columns;
    const In *left = a + row * a_row, *right = b + column * b_column;
    float sum = 0.0f;
    for (std::int64_t k = 0; k < inner; ++k) sum = fmaf(factor(left[k * a_column], tf32), factor(right[k * b_row], tf32), sum);
    Out& place = c[row * c_row + column];
    if (bias != nullptr) sum += bias[column];
    store(place, accumulate ? load(place) + sum : sum);
  }
};

}  // namespace

void plain_matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
  const TensorView& to = how.before_gelu != nullptr ? *how.before_gelu : c;
  with_number(a.dtype, [&]<class In>(In) {
    with_number(to.dtype, [&]<class Out>(Out) {
      for_each(to.elements(), stream,
               Product<In, Out>{a.ptr<In>(), b.ptr<In>(), a.stride(0), a.stride(1), b.stride(0), b.stride(1), a.size(1),
                                to.size(1), to.stride(0), how.bias, how.accumulate, how.tf32, to.ptr<Out>()});
    });
  });
  if (how.before_gelu != nullptr) gelu(to, c, stream);
}

}  // namespace dattn::cuda
