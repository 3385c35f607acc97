// Tests of the cpu kernel on every instruction set of this machine, against the reference in fp64.
#pragma once

#include <cstring>

#include <gtest/gtest.h>

#include "core/attention/cpu/paths.h"
#include "core/base/error.h"
#include "core/base/threads.h"
#include "tests/core/attention/problem.h"

namespace dattn::testing {

inline constexpr double kFp32Tolerance = 2e-6;
inline constexpr double kBf16Rounding = 1.0 / 256;  // half a unit in the last place of bf16, relative
inline constexpr double kFp16Rounding = 1.0 / 2048;
inline constexpr double kTf32Rounding = 1.0 / 2048;

inline std::vector<std::string> paths_here() {
  std::vector<std::string> names;
  for (const char* name : {"avx512bf16", "avx512", "avx2", "portable"}) {
    const ScopedEnv env("DATTN_CPU", name);
    try {
      cpu::choose_path();
      names.emplace_back(name);
    } catch (const Error&) {
    }
  }
  return names;
}

class EveryPath : public ::testing::TestWithParam<std::string> {
 protected:
  EveryPath() : env_("DATTN_CPU", GetParam().c_str()) { set_num_threads(1); }  // small problems: waking threads costs more
  ~EveryPath() override { set_num_threads(threads_); }
  ScopedEnv env_;
  int threads_ = num_threads();
};

inline void expect_close(const Results& a, const Results& b, double tolerance, const std::string& what) {
  EXPECT_LE(relative_error(a.out, b.out), tolerance) << what << ": out";
  EXPECT_LE(relative_error(a.lse, b.lse), tolerance) << what << ": lse";
  EXPECT_LE(relative_error(a.dq, b.dq), tolerance) << what << ": dq";
  EXPECT_LE(relative_error(a.dk, b.dk), tolerance) << what << ": dk";
  EXPECT_LE(relative_error(a.dv, b.dv), tolerance) << what << ": dv";
  if (b.dbias.defined()) {
    EXPECT_LE(relative_error(a.dbias, b.dbias), tolerance) << what << ": dbias";
  }
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a->shape == b->shape && std::memcmp(a.ptr<void>(), b.ptr<void>(), static_cast<std::size_t>(a->bytes())) == 0;
}

// fp32 and fp16, which is widened to it, within 2e-6, and bf16 within 1.5 roundings of P and dS.
inline void check(const Problem& p, const std::string& what) {
  const Inputs inputs = random_inputs(p, DType::kBF16);
  const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  expect_close(run_kernel(cpu_kernel(), p, inputs, DType::kF32), wanted, kFp32Tolerance, what + " fp32");
  expect_close(run_kernel(cpu_kernel(), p, inputs, DType::kF16), wanted, kFp32Tolerance, what + " fp16");
  expect_close(run_kernel(cpu_kernel(), p, inputs, DType::kBF16), wanted, 1.5 * kBf16Rounding, what + " bf16");
}

#define DATTN_ON_EVERY_PATH(suite) \
  INSTANTIATE_TEST_SUITE_P(Path, suite, ::testing::ValuesIn(paths_here()), [](const auto& path) { return path.param; })

}  // namespace dattn::testing
