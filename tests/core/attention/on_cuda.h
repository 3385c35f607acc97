// Tests of the cuda kernel on the first CUDA device, in the tests' default run that of the stand-in, against the reference in
// fp64. Sizes are small: the stand-in makes some ten million steps of a thread a second.
#pragma once

#include "core/device/tf32.h"
#include "tests/core/attention/every_path.h"
#include "tests/core/device/on_cuda.h"

namespace dattn::testing {

inline const AttentionKernel& cuda_kernel() { return find_kernel("cuda", kCuda); }

inline Results run_cuda(const Problem& p, const Inputs& inputs, DType storage) {
  return run_kernel(cuda_kernel(), p, inputs, storage, kCuda);
}

// TF32 for a scope.
class Tf32Allowed {
 public:
  explicit Tf32Allowed(bool allowed = true) { allow_tf32(allowed); }
  ~Tf32Allowed() { allow_tf32(false); }
  Tf32Allowed(const Tf32Allowed&) = delete;
  Tf32Allowed& operator=(const Tf32Allowed&) = delete;
};

// What the kernel computes in, fp64 aside.
struct Precision {
  DType storage;
  bool tf32;
};
inline constexpr Precision kPrecisions[] = {
    {DType::kF32, false}, {DType::kBF16, false}, {DType::kF16, false}, {DType::kF32, true}};

// P and dS are rounded to halves or TF32, otherwise all is exact but for the sums.
inline double cuda_tolerance(DType storage) {
  switch (storage) {
    case DType::kBF16: return 1.5 * kBf16Rounding;
    case DType::kF16: return 1.5 * kFp16Rounding;
    case DType::kF64: return 1e-13;
    default: return tf32_allowed() ? 1.5 * kTf32Rounding : kFp32Tolerance;
  }
}

inline void check_cuda(const Problem& p, DType storage, const std::string& what) {
  const Inputs inputs = random_inputs(p, DType::kBF16);
  expect_close(run_cuda(p, inputs, storage), run_kernel(reference_kernel(), p, inputs, DType::kF64), cuda_tolerance(storage),
               fmt::format("{} {}{}", what, name_of(storage), tf32_allowed() ? " TF32" : ""));
}
inline void check_cuda(const Problem& p, const std::string& what) {
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    check_cuda(p, storage, what);
  }
}
// On tensor cores alone.
inline void check_tensor_cores(const Problem& p, const std::string& what) {
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    if (is_half(storage) || tf32) check_cuda(p, storage, what);
  }
}

}  // namespace dattn::testing
