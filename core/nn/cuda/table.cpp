// The layers' part of the CUDA module's table.
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {

const CudaNn kNnTable{
    .matmul = matmul,
    .column_sums = column_sums,
    .gelu = gelu,
    .gelu_backward = gelu_backward,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .norm = norm,
    .norm_backward = norm_backward,
    .rope = rope,
    .dropout = dropout,
    .residual = residual,
    .gather_rows = gather_rows,
    .scatter_rows = scatter_rows,
    .row_maxima = row_maxima,
    .row_exponentials = row_exponentials,
    .logit_gradients = logit_gradients,
    .adamw = adamw,
    .squared_norm = squared_norm,
};

}  // namespace dattn::cuda
