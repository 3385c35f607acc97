// The list of kernels: order, choice by name, by environment and by what is supported; what callers get wrong.
#include "core/attention/kernel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "tests/core/attention/problem.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Kernels, BestFirstReferenceLast) {
  ASSERT_GE(attention_kernels().size(), 2u);
  EXPECT_EQ(attention_kernels().back()->name(), "reference");
  EXPECT_EQ(find_kernel("cpu").name(), "cpu");
  EXPECT_THAT(message_of([] { find_kernel("gpu"); }),
              ::testing::AllOf(::testing::HasSubstr("'gpu'"), ::testing::HasSubstr("cpu, reference")));
}

TEST(Kernels, ChosenByWhatTheySupport) {
  EXPECT_EQ(select_kernel({DType::kF32, 64, 64}).name(), "cpu");
  EXPECT_EQ(select_kernel({DType::kBF16, 192, 128}).name(), "cpu");
  EXPECT_EQ(select_kernel({DType::kF64, 64, 64}).name(), "reference");
  EXPECT_EQ(select_kernel({DType::kF32, 257, 64}).name(), "reference");
  EXPECT_THAT(cpu_kernel().supports({DType::kF64, 64, 64}).why, ::testing::HasSubstr("fp64"));
  EXPECT_THAT(cpu_kernel().supports({DType::kF32, 64, 300}).why, ::testing::HasSubstr("300"));
}

TEST(Kernels, ForcedByEnvironment) {
  const ScopedEnv env("DATTN_KERNEL", "reference");
  EXPECT_EQ(select_kernel({DType::kF32, 64, 64}).name(), "reference");
  const ScopedEnv cpu("DATTN_KERNEL", "cpu");
  EXPECT_THAT(message_of([] { select_kernel({DType::kF64, 64, 64}); }), ::testing::HasSubstr("DATTN_KERNEL=cpu"));
  const ScopedEnv unknown("DATTN_KERNEL", "fast");
  EXPECT_THROW(select_kernel({DType::kF32, 64, 64}), Error);
}

TEST(Kernels, WrongArgumentsAreNamed) {
  const Problem p = make_problem(8, 8, 2, 2, 4, 4, Mask::full());
  const Inputs in = random_inputs(p, DType::kF64);
  const Tensor q = to_dtype(in.q, DType::kF32), k = to_dtype(in.k, DType::kF32), v = to_dtype(in.v, DType::kF32);
  const Tensor out(DType::kF32, {1, 8, 2, 4}), lse(DType::kF32, {1, 2, 8});
  for (const AttentionKernel* kernel : attention_kernels()) {
    const AttendArgs good{q, k, v, p.map, p.tiles, 1.0, out, lse, false};
    EXPECT_EQ(message_of([&] { kernel->attend(good); }), "no error");
    AttendArgs bad = good;
    bad.k = k->slice(3, 0, 3);
    EXPECT_THAT(message_of([&] { kernel->attend(bad); }), ::testing::HasSubstr("k has shape [1, 8, 2, 3]"));
    bad = good;
    bad.v = v->transpose(1, 3).transpose(1, 3);
    bad.out = out->transpose(1, 3);
    EXPECT_THAT(message_of([&] { kernel->attend(bad); }), ::testing::HasSubstr("out has shape"));
    bad = good;
    bad.lse = lse->slice(2, 0, 7);
    EXPECT_THAT(message_of([&] { kernel->attend(bad); }), ::testing::HasSubstr("lse"));
    bad = good;
    bad.heads.q_begin = 2;
    EXPECT_THAT(message_of([&] { kernel->attend(bad); }), ::testing::HasSubstr("KV heads"));
    const std::vector<Tile> outside = {{{{0, 8}, {0, 9}}}};
    bad = good;
    bad.tiles = outside;
    EXPECT_THAT(message_of([&] { kernel->attend(bad); }), ::testing::HasSubstr("outside"));
  }
}

}  // namespace
}  // namespace dattn
