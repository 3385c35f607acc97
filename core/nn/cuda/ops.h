// The operations of CudaNn (core/nn/cuda_nn.h), as the files core/nn/*.cu define them.
#pragma once

#include "core/device/cuda/runtime.h"
#include "core/nn/cuda_nn.h"

namespace dattn::cuda {

extern const CudaNn kNnTable;

void plain_matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream);
void column_sums(const TensorView& x, const TensorView& sums, NativeStream stream);
void gelu(const TensorView& u, const TensorView& a, NativeStream stream);
void gelu_backward(const TensorView& u, const TensorView& da, const TensorView& a, const TensorView& du, NativeStream stream);
void swiglu(const TensorView& gate, const TensorView& up, const TensorView& a, NativeStream stream);
void swiglu_backward(const TensorView& gate, const TensorView& up, const TensorView& da, const TensorView& a,
                     const TensorView& dgate, const TensorView& dup, NativeStream stream);
void norm(const TensorView& x, const float* w, const float* b, bool centered, float epsilon, const TensorView& y,
          const TensorView& stats, NativeStream stream);
void norm_backward(const TensorView& x, const TensorView& stats, const float* w, bool centered, const TensorView& dy,
                   const TensorView& dx, float* dw, float* db, NativeStream stream);
void rope(const TensorView& x, const TensorView& table, bool inverse, NativeStream stream);
void dropout(const CudaDropout& dropout, const TensorView& x, NativeStream stream);
void residual(const CudaDropout& dropout, const TensorView& x, const float* bias, const TensorView& branch,
              NativeStream stream);
void gather_rows(const TensorView& table, const std::int32_t* index, bool add, const TensorView& x, NativeStream stream);
void scatter_rows(const TensorView& dx, const CudaRowGroups& groups, const TensorView& gradient, NativeStream stream);
void row_maxima(const TensorView& logits, const TensorView& maxima, NativeStream stream);
void row_exponentials(const TensorView& logits, const TensorView& maxima, const std::int32_t* targets, std::int64_t first,
                      const TensorView& sums, NativeStream stream);
void logit_gradients(const TensorView& logits, const TensorView& sums, const std::int32_t* targets, std::int64_t first,
                     float scale, NativeStream stream);
void adamw(const AdamWUpdate& update, const TensorView& gradient, const TensorView& m, const TensorView& v,
           const TensorView& value, NativeStream stream);
void squared_norm(const TensorView& x, const TensorView& sum, NativeStream stream);

}  // namespace dattn::cuda
