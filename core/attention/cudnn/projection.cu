#include "core/attention/cudnn/projection.h"
#include "core/device/cuda/loops.h"
#include "core/device/cuda/number.h"

namespace dattn::cudnn {
namespace {

template <class T>
struct Project {
  const T* dout;
  T* out;
  const float* delta;
  std::int64_t seq, heads, dim;
  std::int64_t b, s, h;                    // strides of dout and out
  std::int64_t delta_b, delta_h, delta_s;  // of delta

  // row: of [B, H, S], s fastest.
  __device__ void operator()(std::int64_t row, int lane) const {
    const std::int64_t i_s = row % seq, i_h = row / seq % heads, i_b = row / seq / heads;
    const std::int64_t at = i_b * b + i_s * s + i_h * h;
    float most = 0;
    for (std::int64_t d = lane; d < dim; d += 32) most = fmaxf(most, fabsf(cuda::load(dout[at + d])));
    most = cuda::warp_max(most);
    const float scale = most > 0 ? 1.0f / most : 0.0f;  // so that squares neither vanish nor overflow
    float square = 0;
    for (std::int64_t d = lane; d < dim; d += 32) {
      const float x = cuda::load(dout[at + d]) * scale;
      square = fmaf(x, x, square);
    }
    square = cuda::warp_sum(square);
    const float factor = most > 0 ? delta[i_b * delta_b + i_h * delta_h + i_s * delta_s] * scale / square : 0.0f;
    for (std::int64_t d = lane; d < dim; d += 32) cuda::store(out[at + d], factor * (cuda::load(dout[at + d]) * scale));
  }
};

}  // namespace

void project(const TensorView& dout, const TensorView& delta, const TensorView& out, NativeStream stream) {
  const std::int64_t rows = dout.size(0) * dout.size(1) * dout.size(2);
  with_number(dout.dtype, [&]<class T>(T) {
    cuda::for_each_row(
        rows, stream,
        Project<T>{dout.ptr<T>(), out.ptr<T>(), delta.ptr<float>(), dout.size(1), dout.size(2), dout.size(3), dout.stride(0),
                   dout.stride(1), dout.stride(2), delta.stride(0), delta.stride(1), delta.stride(2)});
  });
}

}  // namespace dattn::cudnn
