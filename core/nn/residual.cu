// The residual stream and its dropout on the device (see residual.h).
#include "core/base/philox.h"
#include "core/device/cuda/loops.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

// What element (row, j) of [R, M] is multiplied by. Feature j is word j / Q of block j mod Q, Q = ceil(M / 4).
struct Scale {
  CudaDropout dropout;
  std::int64_t dim;

  __device__ float operator()(std::int64_t row, std::int64_t j) const {
    const std::int64_t token = dropout.row_begin + row, quarter = (dim + 3) / 4;
    const auto position = static_cast<std::uint64_t>(dropout.positions[token % dropout.seq]);
    const PhiloxBlock words = philox4x32(
        dropout.key, {static_cast<std::uint32_t>(j % quarter), static_cast<std::uint32_t>(position),
                      static_cast<std::uint32_t>(position >> 32), static_cast<std::uint32_t>(dropout.batch_begin + token / dropout.seq)});
    return (words[static_cast<std::size_t>(j / quarter)] >> 8) >= dropout.threshold ? dropout.kept : 0.0f;
  }
};

struct Drop {
  Scale scale;
  float* x;
  __device__ void operator()(std::int64_t i) const { x[i] *= scale(i / scale.dim, i % scale.dim); }
};

template <bool kDrops>
struct Add {
  Scale scale;
  const float *x, *bias;
  float* branch;
  __device__ void operator()(std::int64_t i) const {
    const std::int64_t j = i % scale.dim;
    const float sum = branch[i] + (bias != nullptr ? bias[j] : 0.0f);
    branch[i] = x[i] + (kDrops ? sum * scale(i / scale.dim, j) : sum);
  }
};

}  // namespace

void dropout(const CudaDropout& dropout, const TensorView& x, NativeStream stream) {
  for_each(x.elements(), stream, Drop{{dropout, x.size(1)}, x.ptr<float>()});
}

void residual(const CudaDropout& dropout, const TensorView& x, const float* bias, const TensorView& branch, NativeStream stream) {
  const Scale scale{dropout, x.size(1)};
  if (dropout.threshold > 0)
    for_each(x.elements(), stream, Add<true>{scale, x.ptr<float>(), bias, branch.ptr<float>()});
  else
    for_each(x.elements(), stream, Add<false>{scale, x.ptr<float>(), bias, branch.ptr<float>()});
}

}  // namespace dattn::cuda
