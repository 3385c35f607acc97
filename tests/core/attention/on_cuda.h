// Tests of the cuda kernel on the first CUDA device, in the tests' default run that of the stand-in, against the reference in
// fp64. Sizes are small: the stand-in makes some ten million steps of a thread a second.
#pragma once

#include "tests/core/attention/every_path.h"
#include "tests/core/device/on_cuda.h"

namespace dattn::testing {

inline const AttentionKernel& cuda_kernel() { return find_kernel("cuda", kCuda); }

inline Results run_cuda(const Problem& p, const Inputs& inputs, DType storage) {
  return run_kernel(cuda_kernel(), p, inputs, storage, kCuda);
}

// P and dS are rounded to halves, otherwise all is exact but for the sums.
inline double cuda_tolerance(DType storage) {
  switch (storage) {
    case DType::kBF16: return 1.5 * kBf16Rounding;
    case DType::kF16: return 1.5 * kFp16Rounding;
    case DType::kF64: return 1e-13;
    default: return kFp32Tolerance;
  }
}

inline void check_cuda(const Problem& p, DType storage, const std::string& what) {
  const Inputs inputs = random_inputs(p, DType::kBF16);
  expect_close(run_cuda(p, inputs, storage), run_kernel(reference_kernel(), p, inputs, DType::kF64), cuda_tolerance(storage),
               fmt::format("{} {}", what, name_of(storage)));
}
inline void check_cuda(const Problem& p, const std::string& what) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) check_cuda(p, storage, what);
}

}  // namespace dattn::testing
