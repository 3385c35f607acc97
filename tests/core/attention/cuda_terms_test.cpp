// Softcap, ALiBi, bias and dropout in the cuda kernel, on shards of every layout.
#include "tests/core/attention/on_cuda.h"
#include "tests/core/attention/some_terms.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CudaTerms : public OnCuda {};

void check_each(const Problem& p, std::int64_t positions, const std::string& what) {
  for_each_term(p, positions, what, [](const Problem& one, const std::string& name) { check_cuda(one, name); });
}

Problem placed(const Mask& mask, const Positions& queries, const Positions& keys, std::int64_t positions, std::int64_t dim_qk,
               std::int64_t dim_v) {
  return testing::placed(mask, queries, keys, positions, 1, dim_qk, dim_v);
}

TEST_F(CudaTerms, ContiguousShards) {
  const Positions all = Positions::range(0, 150);
  check_each(placed(Mask::causal(), all, all, 150, 16, 24), 150, "causal");
  check_each(placed(Mask::window(70, 9), Positions::range(101, 190), Positions::range(33, 183), 200, 24, 24), 200, "window");
  check_each(placed(Mask::documents({0, 50, 51, 130, 150}, Mask::causal()), all, all, 150, 16, 16), 150, "documents");
}

TEST_F(CudaTerms, ZigzagAndStripedShards) {
  const Positions zigzag({{30, 41, 1}, {200, 37, 1}}), late({{111, 51, 1}, {162, 40, 1}});
  check_each(placed(Mask::causal(), zigzag, late, 250, 16, 24), 250, "zigzag");
  const Positions even({{1, 80, 3}}), odd({{3, 70, 3}});
  check_each(placed(Mask::causal(), even, odd, 300, 16, 24), 300, "striped");
  check_each(placed(Mask::window(100, 100), Positions({{1, 20, 7}}), Positions::range(0, 150), 150, 16, 16), 150, "stairs");
  check_each(placed(Mask::window(2, 1), Positions::range(5, 105), Positions({{1, 25, 7}}), 180, 16, 16), 180, "gaps");
  check_each(placed(Mask::window(2, 1), Positions({{1, 25, 7}}), Positions::range(5, 105), 180, 16, 16), 180, "gaps of keys");
}

TEST_F(CudaTerms, HeadsOfAPartOfTheModelAndSeveralBatchRows) {
  Problem p = make_problem(40, 70, 5, 3, 16, 24, Mask::full());
  p.batch = 2;
  p.map = {4, 0, 3};
  p.softcap = 2;
  p.slopes = slopes_of(9);
  p.dropout = {0.5, 1, 2, 3, 9};
  for (const Shape& bias : {Shape{2, 40, 5, 75}, Shape{2, 40, 1, 75}, Shape{1, 40, 5, 75}, Shape{1, 40, 1, 75}}) {
    p.bias = bias;
    check_cuda(p, "bias " + bias.text());
  }
}

TEST_F(CudaTerms, LargeDimsHaveThemToo) {
  for (const auto& [dim_qk, dim_v] : {std::pair<std::int64_t, std::int64_t>{128, 128}, {192, 128}, {256, 256}}) {
    Problem p = make_problem(70, 90, 2, 1, dim_qk, dim_v, Mask::causal());
    p.softcap = 2;
    p.bias = {1, 70, 2, 90};
    check_tensor_cores(p, fmt::format("bias, {} and {}", dim_qk, dim_v));
    p.dropout = {0.3, 1, 2, 3, 2};
    check_tensor_cores(p, fmt::format("dropout, {} and {}", dim_qk, dim_v));
  }
}

TEST_F(CudaTerms, NegativeScaleAndNarrowSoftcap) {
  Problem p = make_problem(70, 130, 2, 1, 32, 32, Mask::full());
  p.scale = -0.4;
  for (const double softcap : {0.05, 30.0}) {
    p.softcap = softcap;
    check_cuda(p, fmt::format("softcap {}", softcap));
  }
  p.slopes = {0.1, -0.2};
  check_cuda(p, "slopes of both signs");
}

TEST_F(CudaTerms, BiasOfMinusInfinityHides) {
  Problem p = make_problem(100, 120, 1, 1, 16, 16, Mask::full());
  p.bias = {1, 100, 1, 120};
  const Inputs inputs = random_inputs(p, DType::kBF16);
  for (std::int64_t row = 0; row < 100; ++row) {
    for (std::int64_t key = row; key < 120; ++key)
      inputs.bias->at<double>(0, row, 0, key) = -std::numeric_limits<double>::infinity();
  }
  const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    const Results got = run_cuda(p, inputs, storage);
    expect_close(got, wanted, cuda_tolerance(storage), "hidden by bias");
    EXPECT_EQ(got.lse->at<float>(0, 0, 0), -std::numeric_limits<float>::infinity());
  }
}

// Dropping leaves the softmax alone, and what is kept are the very pairs of the reference: v picks out each key.
TEST_F(CudaTerms, DropoutDropsTheReferencesPairsAndKeepsLse) {
  for (const std::int64_t step : {1, 5}) {
    for (const std::int64_t shift : {0, 1, 2, 3}) {
      for (const auto& [storage, tf32] : kPrecisions) {
        const Tf32Allowed allowed(tf32);
        Problem p = placed(Mask::full(), Positions({{7, 20, step}}), Positions({{shift, 64, step}}), 400, 8, 64);
        p.dropout = {0.37, 0x123456789abcdefull, 0xfedcba98u, 3, 8};
        const Inputs inputs = random_inputs(p, DType::kBF16);
        fill_zero(inputs.v);
        for (std::int64_t key = 0; key < 64; ++key) inputs.v->at<double>(0, key, 0, key) = 1;
        const Results got = run_cuda(p, inputs, storage);
        const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
        for (std::int64_t i = 0; i < got.out->elements(); ++i) {
          ASSERT_EQ(got.out.ptr<float>()[i] == 0, wanted.out.ptr<double>()[i] == 0)
              << i << " step " << step << " from " << shift;
        }
        p.dropout.p = 0;
        const double same =
            storage == DType::kF32 && !tf32 ? 0.0 : 1e-6;  // tensor cores: scores in base 2 from the start, or not
        EXPECT_LE(relative_error(got.lse, run_cuda(p, inputs, storage).lse), same);
      }
    }
  }
}

// Sums that several heads and batch rows share have one order.
TEST_F(CudaTerms, TwoRunsHaveTheSameBits) {
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    for (const Shape& bias : {Shape{1, 80, 1, 90}, Shape{2, 80, 1, 90}, Shape{1, 80, 4, 90}}) {
      Problem p = make_problem(80, 90, 4, 2, 16, 16, Mask::full());
      p.batch = 2;
      p.bias = bias;
      p.softcap = 2;
      p.dropout = {0.1, 1, 2, 0, 4};
      const Inputs inputs = random_inputs(p, storage);
      const Results one = run_cuda(p, inputs, storage), two = run_cuda(p, inputs, storage);
      EXPECT_TRUE(same_bits(one.out, two.out) && same_bits(one.lse, two.lse));
      EXPECT_TRUE(same_bits(one.dq, two.dq) && same_bits(one.dk, two.dk) && same_bits(one.dv, two.dv));
      EXPECT_TRUE(same_bits(one.dbias, two.dbias)) << bias.text();
    }
  }
}

}  // namespace
}  // namespace dattn
