// Rows of tables on the device: token embedding and learned positions (see embedding.h).
#include "core/device/cuda/loops.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

struct Gather {
  const float* table;
  const std::int32_t* index;
  bool add;
  std::int64_t dim;
  float* x;
  __device__ void operator()(std::int64_t i) const {
    const std::int64_t row = index[i / dim];
    const float value = row >= 0 ? table[row * dim + i % dim] : 0.0f;
    x[i] = add ? x[i] + value : value;
  }
};

struct Scatter {
  const float* dx;
  CudaRowGroups groups;
  std::int64_t dim;
  float* gradient;
  __device__ void operator()(std::int64_t i) const {  // i = (group, feature)
    const std::int64_t group = i / dim, j = i % dim;
    float& sum = gradient[groups.target[group] * dim + j];
    for (std::int32_t row = groups.begin[group]; row < groups.begin[group + 1]; ++row) sum += dx[groups.rows[row] * dim + j];
  }
};

}  // namespace

void gather_rows(const TensorView& table, const std::int32_t* index, bool add, const TensorView& x, NativeStream stream) {
  for_each(x.elements(), stream, Gather{table.ptr<float>(), index, add, x.size(1), x.ptr<float>()});
}

void scatter_rows(const TensorView& dx, const CudaRowGroups& groups, const TensorView& gradient, NativeStream stream) {
  const std::int64_t dim = dx.size(1);
  for_each(groups.groups * dim, stream, Scatter{dx.ptr<float>(), groups, dim, gradient.ptr<float>()});
}

}  // namespace dattn::cuda
