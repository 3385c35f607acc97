// The kernels as functions of the host; on `stream`, errors as core/device/cuda/language.h's check().
#pragma once

#include <cuda_runtime.h>

#include "core/attention/cuda/params.h"
#include "core/tensor/tensor.h"

namespace dattn::cuda {

// positions[row + i] = position + i * step for each run.
void expand_positions(const PositionRun* runs, int n_runs, std::int64_t* positions, cudaStream_t stream);

void merge_shares(const SharesParams& params, cudaStream_t stream);

// Row *at of cache [1, capacity, K, D] = row [1, 1, K, D].
void store_row(const TensorView& row, const std::int32_t* at, const TensorView& cache, cudaStream_t stream);

// Any storage, dims up to kMaxPlainDim; block lists of kPlainRows rows.
inline constexpr int kMaxPlainDim = 256;
inline constexpr int kPlainRows = 64;
void plain_attend(const AttendParams& params, cudaStream_t stream);
void plain_attend_grad(const GradParams& params, cudaStream_t stream);

// On tensor cores, for dims up to those of the name: bf16 and fp16, and fp32 rounded to TF32 for dims of q up to kMostTf32Dim.
// Rows of all operands and dims aligned to 16 bytes. Block lists of 128 query rows, of 64 for dims up to 256.
inline constexpr int kMostTf32Dim = 192;
void mma_attend_64(const AttendParams& params, cudaStream_t stream);
void mma_attend_128(const AttendParams& params, cudaStream_t stream);
void mma_attend_192(const AttendParams& params, cudaStream_t stream);  // 192 and 128
void mma_attend_256(const AttendParams& params, cudaStream_t stream);

// Block lists of 64 rows.
void mma_attend_grad_64(const GradParams& params, cudaStream_t stream);
void mma_attend_grad_128(const GradParams& params, cudaStream_t stream);
void mma_attend_grad_192(const GradParams& params, cudaStream_t stream);
void mma_attend_grad_256(const GradParams& params, cudaStream_t stream);

}  // namespace dattn::cuda
