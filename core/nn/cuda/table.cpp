// The layers' part of the CUDA module's table.
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn {

const CudaNn& cuda_nn_of_this_build() {
  static const CudaNn table{cuda::matmul,        cuda::column_sums,  cuda::gelu,
                            cuda::gelu_backward, cuda::swiglu,       cuda::swiglu_backward,
                            cuda::norm,          cuda::norm_backward, cuda::rope,
                            cuda::dropout,       cuda::residual,     cuda::gather_rows,
                            cuda::scatter_rows,  cuda::row_maxima,   cuda::row_exponentials,
                            cuda::logit_gradients, cuda::adamw,      cuda::squared_norm};
  return table;
}

}  // namespace dattn
