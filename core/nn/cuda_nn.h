// The layers' operations on a CUDA device: the part of the CUDA module (core/device/cuda_module.h) that mirrors core/nn. Each
// does what the function of the same name does on the host, in a fixed order of sums; the caller allocates all tensors.
// Views are contiguous unless said otherwise; T is fp32, bf16 or fp16, everything else fp32.
#pragma once

#include <cstdint>

#include "core/nn/residual.h"
#include "core/tensor/tensor.h"

namespace dattn {

// Where dropped elements stand: the device's form of Dropout and TokenRows.
struct CudaDropout {
  std::uint32_t threshold = 0;  // of the upper 24 bits; 0 = nothing is dropped
  float kept = 1.0f;            // what kept elements are multiplied by
  std::uint64_t key = 0;
  std::int64_t row_begin = 0;       // of B * S rows in b-major order
  std::int64_t batch_begin = 0;     // global number of the first batch row
  const std::int64_t* positions{};  // [S], on the device
  std::int64_t seq = 1;
};

// One AdamW step of a parameter (optimizer.h).
struct AdamWUpdate {
  float gradient_scale, beta1, beta2, correction1, correction2, epsilon, rate, decay;
};

// For embedding gradients: the rows of dx in groups that share a target row, each group in ascending order, so that sums have
// one order. Lists on the device.
struct CudaRowGroups {
  std::int64_t groups = 0;
  const std::int32_t* target{};  // [groups], row of the gradient
  const std::int32_t* begin{};   // [groups + 1], into rows
  const std::int32_t* rows{};    // row of dx
};

// How matrices are multiplied (matmul.h).
struct CudaMatmul {
  const float* bias = nullptr;  // [n]
  bool accumulate = false;
  bool tf32 = false;   // fp32 factors may be rounded to TF32
  bool fixed = false;  // no sum is split over blocks
  const TensorView* before_gelu = nullptr;
};

struct CudaNn {
  // c [m, n] = a [m, k] b [k, n] (+ c) (+ bias [n]); a and b of one T with one stride of 1, c of any T with contiguous rows.
  // With before_gelu, contiguous as c is then and of its T, the product goes there and c is its gelu; nothing is added to c.
  // The order of its sums depends on shapes, strides, types and alignment of rows alone.
  void (*matmul)(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, void* stream);
  void (*column_sums)(const TensorView& x, const TensorView& sums, void* stream);  // x [N, M] of T, sums [M] += ..

  void (*gelu)(const TensorView& u, const TensorView& a, void* stream);  // all of one T but da
  void (*gelu_backward)(const TensorView& u, const TensorView& da, const TensorView& a, const TensorView& du, void* stream);
  void (*swiglu)(const TensorView& gate, const TensorView& up, const TensorView& a, void* stream);
  void (*swiglu_backward)(const TensorView& gate, const TensorView& up, const TensorView& da, const TensorView& a,
                          const TensorView& dgate, const TensorView& dup, void* stream);

  // x, y [R, M]; w, b [M] (b may be null); stats [R, 2].
  void (*norm)(const TensorView& x, const float* w, const float* b, bool centered, float epsilon, const TensorView& y,
               const TensorView& stats, void* stream);
  void (*norm_backward)(const TensorView& x, const TensorView& stats, const float* w, bool centered, const TensorView& dy,
                        const TensorView& dx, float* dw, float* db, void* stream);

  void (*rope)(const TensorView& x, const TensorView& table, bool inverse, void* stream);  // x [B, S, H, D] of T, table [S, D]

  void (*dropout)(const CudaDropout& dropout, const TensorView& x, void* stream);  // x [R, M]
  void (*residual)(const CudaDropout& dropout, const TensorView& x, const float* bias, const TensorView& branch, void* stream);

  // x [N, M] = rows of table [V, M] that index [N] (on the device) names, zeros where it is negative; added where `add`.
  void (*gather_rows)(const TensorView& table, const std::int32_t* index, bool add, const TensorView& x, void* stream);
  void (*scatter_rows)(const TensorView& dx, const CudaRowGroups& groups, const TensorView& gradient, void* stream);

  // Cross-entropy by rows of logits [N, V]: maxima [N]; then, logits replaced by exp(logit - maximum), sums [2, N] = their sum
  // and the target's logit less the maximum (0 where the target, less `first`, is not here); then the gradient in place.
  void (*row_maxima)(const TensorView& logits, const TensorView& maxima, void* stream);
  void (*row_exponentials)(const TensorView& logits, const TensorView& maxima, const std::int32_t* targets, std::int64_t first,
                           const TensorView& sums, void* stream);
  void (*logit_gradients)(const TensorView& logits, const TensorView& sums, const std::int32_t* targets, std::int64_t first,
                          float scale, void* stream);

  void (*adamw)(const AdamWUpdate& update, const TensorView& gradient, const TensorView& m, const TensorView& v,
                const TensorView& value, void* stream);
  // sum, fp64 [1] on the device := sum of the squares of x [N, M] (rows of any stride), in a fixed order.
  void (*squared_norm)(const TensorView& x, const TensorView& sum, void* stream);
};

}  // namespace dattn
