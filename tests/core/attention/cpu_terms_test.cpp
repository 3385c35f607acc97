// Softcap, ALiBi, bias and dropout in the cpu kernel against the reference in fp64, on every instruction set here.
#include <rapidcheck.h>

#include "tests/core/attention/every_path.h"
#include "tests/core/attention/some_terms.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CpuTerms : public EveryPath {};

void check_each(const Problem& p, std::int64_t positions, const std::string& what) { for_each_term(p, positions, what, check); }

Problem placed(const Mask& mask, const Positions& queries, const Positions& keys, std::int64_t positions, std::int64_t dim_qk,
               std::int64_t dim_v) {
  return testing::placed(mask, queries, keys, positions, 2, dim_qk, dim_v);
}

TEST_P(CpuTerms, ContiguousShards) {
  const Positions all = Positions::range(0, 420);
  check_each(placed(Mask::causal(), all, all, 420, 32, 48), 420, "causal");
  check_each(placed(Mask::window(70, 9), Positions::range(101, 260), Positions::range(33, 323), 420, 24, 24), 420, "window");
  check_each(placed(Mask::documents({0, 50, 51, 230, 420}, Mask::causal()), all, all, 420, 16, 16), 420, "documents");
}

TEST_P(CpuTerms, ZigzagAndStripedShards) {
  const Positions zigzag({{30, 61, 1}, {330, 77, 1}}), late({{111, 91, 1}, {202, 120, 1}});
  check_each(placed(Mask::causal(), zigzag, late, 420, 32, 20), 420, "zigzag");
  for (const std::int64_t step : {2, 3, 4, 7}) {
    const Positions even({{1, 110, step}}), odd({{3, 90, step}});
    check_each(placed(Mask::causal(), even, odd, 800, 32, 20), 800, fmt::format("striped by {}", step));
  }
}

TEST_P(CpuTerms, RowsOfOtherStepsThanTheKeys) {
  check_each(placed(Mask::window(100, 100), Positions({{1, 20, 7}}), Positions::range(0, 150), 150, 16, 16), 150, "stairs");
  check_each(placed(Mask::window(2, 1), Positions::range(5, 105), Positions({{1, 25, 7}}), 180, 16, 16), 180, "gaps");
  check_each(placed(Mask::window(2, 1), Positions({{1, 25, 7}}), Positions::range(5, 105), 180, 16, 16), 180, "gaps of keys");
}

TEST_P(CpuTerms, HeadsOfAPartOfTheModelAndSeveralBatchRows) {
  Problem p = make_problem(70, 90, 5, 3, 16, 24, Mask::full());
  p.batch = 2;
  p.map = {4, 0, 3};
  check_each(p, 90, "heads 4 to 8");
  p.bias = {2, 70, 1, 95};
  p.dropout = {0.5, 1, 2, 3, 9};
  check(p, "one bias for the heads of a batch row");
}

TEST_P(CpuTerms, DecodeHasThemToo) {
  for (const std::int64_t rows : {1, 3}) {
    const Positions queries({{1500 - rows, rows, 1}});
    check_each(placed(Mask::causal(), queries, Positions::range(0, 1500), 1500, 40, 17), 1500, "decode");
    check_each(placed(Mask::causal(), Positions({{1190, rows, 3}}), Positions({{2, 400, 3}}), 1500, 40, 17), 1500, "striped");
  }
}

TEST_P(CpuTerms, NegativeScaleAndNarrowSoftcap) {
  Problem p = make_problem(130, 300, 2, 1, 32, 32, Mask::full());
  p.scale = -0.4;
  for (const double softcap : {0.05, 30.0}) {
    p.softcap = softcap;
    check(p, fmt::format("softcap {}", softcap));
  }
  p.slopes = {0.1, -0.2};
  check(p, "slopes of both signs");
}

TEST_P(CpuTerms, BiasOfMinusInfinityHides) {
  Problem p = make_problem(100, 120, 2, 2, 16, 16, Mask::full());
  p.bias = {1, 100, 1, 120};
  const Inputs inputs = random_inputs(p, DType::kBF16);
  for (std::int64_t row = 0; row < 100; ++row) {
    for (std::int64_t key = row; key < 120; ++key)
      inputs.bias->at<double>(0, row, 0, key) = -std::numeric_limits<double>::infinity();
  }
  const Results got = run_kernel(cpu_kernel(), p, inputs, DType::kF32);
  expect_close(got, run_kernel(reference_kernel(), p, inputs, DType::kF64), kFp32Tolerance, "hidden by bias");
  EXPECT_EQ(got.lse->at<float>(0, 0, 0), -std::numeric_limits<float>::infinity());
}

// Dropping leaves the softmax alone, and what is kept are the very pairs of the reference: v picks out each key.
TEST_P(CpuTerms, DropoutDropsTheReferencesPairsAndKeepsLse) {
  for (const std::int64_t step : {1, 5}) {
    for (const std::int64_t shift : {0, 1, 2, 3}) {
      Problem p = placed(Mask::full(), Positions({{7, 20, step}}), Positions({{shift, 64, step}}), 400, 4, 64);
      p.dropout = {0.37, 0x123456789abcdefull, 0xfedcba98u, 3, 8};
      const Inputs inputs = random_inputs(p, DType::kBF16);
      fill_zero(inputs.v);
      for (std::int64_t key = 0; key < 64; ++key) {
        for (std::int64_t kv = 0; kv < 2; ++kv) inputs.v->at<double>(0, key, kv, key) = 1;
      }
      const Results got = run_kernel(cpu_kernel(), p, inputs, DType::kF32);
      const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
      for (std::int64_t i = 0; i < got.out->elements(); ++i) {
        ASSERT_EQ(got.out.ptr<float>()[i] == 0, wanted.out.ptr<double>()[i] == 0) << i << " step " << step << " from " << shift;
      }
      p.dropout.p = 0;
      EXPECT_TRUE(same_bits(got.lse, run_kernel(cpu_kernel(), p, inputs, DType::kF32).lse));
    }
  }
}

TEST_P(CpuTerms, ThreadsDoNotChangeABit) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const Shape& bias : {Shape{1, 400, 1, 450}, Shape{2, 400, 1, 450}, Shape{1, 400, 6, 450}, Shape{2, 400, 6, 450}}) {
      Problem p = make_problem(400, 450, 6, 3, 16, 16, Mask::full());
      p.batch = 2;
      p.bias = bias;
      p.softcap = 2;
      p.dropout = {0.1, 1, 2, 0, 6};
      const Inputs inputs = random_inputs(p, storage);
      set_num_threads(1);
      const Results one = run_kernel(cpu_kernel(), p, inputs, storage);
      for (const int threads : {2, 5}) {
        set_num_threads(threads);
        const Results many = run_kernel(cpu_kernel(), p, inputs, storage);
        EXPECT_TRUE(same_bits(one.out, many.out) && same_bits(one.lse, many.lse)) << threads;
        EXPECT_TRUE(same_bits(one.dq, many.dq) && same_bits(one.dk, many.dk) && same_bits(one.dv, many.dv)) << threads;
        EXPECT_TRUE(same_bits(one.dbias, many.dbias)) << threads << " threads, " << bias.text();
      }
    }
  }
}

// Two halves of the keys, one after the other, are one call on all of them.
TEST_P(CpuTerms, HalvesOfTheKeysMerge) {
  Problem p = make_problem(150, 300, 4, 2, 32, 24, Mask::window(140, 20));
  p.softcap = 2;
  p.slopes = slopes_of(4);
  p.bias = {1, 150, 4, 300};
  p.dropout = {0.25, 9, 1, 0, 4};
  const Inputs in = random_inputs(p, DType::kF32);
  const Results wanted = run_kernel(reference_kernel(), p, in, DType::kF64);
  const Tensor q = to_dtype(in.q, DType::kF32), k = to_dtype(in.k, DType::kF32), v = to_dtype(in.v, DType::kF32);
  const Tensor dout = to_dtype(in.dout, DType::kF32), bias = to_dtype(in.bias, DType::kF32);
  const Results got{Tensor(DType::kF32, wanted.out->shape), Tensor(DType::kF32, wanted.lse->shape),
                    Tensor(DType::kF32, q->shape),          Tensor(DType::kF32, k->shape),
                    Tensor(DType::kF32, v->shape),          Tensor(DType::kF32, bias->shape)};
  clear_state(got.out, got.lse);
  const auto regions = compile(Mask::window(140, 20), 150, 300);
  const auto each_half = [&](const auto& body) {
    for (const std::int64_t begin : {137, 0}) {
      const std::int64_t count = begin == 0 ? 137 : 163;
      body(begin, count, make_tiles(regions, Positions::range(0, 150), Positions::range(begin, begin + count)));
    }
  };
  const ScoreTerms terms = terms_of(p, bias);
  each_half([&](std::int64_t begin, std::int64_t count, const std::vector<Tile>& tiles) {
    cpu_kernel().attend(
        {q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), got.out, got.lse, true, terms});
  });
  const Tensor delta(DType::kF32, got.lse->shape);
  attention_delta(dout, got.out, delta);
  each_half([&](std::int64_t begin, std::int64_t count, const std::vector<Tile>& tiles) {
    cpu_kernel().attend_grad({q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), dout, got.lse,
                              delta, got.dq, got.dk->slice(1, begin, count), got.dv->slice(1, begin, count), terms, false,
                              got.dbias});
  });
  expect_close(got, wanted, kFp32Tolerance, "halves");
}

TEST_P(CpuTerms, StridedBias) {
  Problem p = make_problem(90, 100, 2, 2, 16, 16, Mask::causal());
  p.bias = {1, 90, 2, 100};
  const Inputs in = random_inputs(p, DType::kF32);
  const Results plain = run_kernel(cpu_kernel(), p, in, DType::kF32);
  const Tensor q = to_dtype(in.q, DType::kF32), k = to_dtype(in.k, DType::kF32), v = to_dtype(in.v, DType::kF32);
  const Tensor dout = to_dtype(in.dout, DType::kF32), delta(DType::kF32, {1, 2, 90});
  const Tensor wide(DType::kF32, {1, 2, 90, 107}), dwide(DType::kF32, {1, 2, 90, 107});
  ScoreTerms terms;
  terms.bias = wide->transpose(1, 2).slice(3, 0, 100);
  const TensorView dbias = dwide->transpose(1, 2).slice(3, 0, 100);
  copy(in.bias, terms.bias);
  const Tensor out(DType::kF32, plain.out->shape), lse(DType::kF32, plain.lse->shape);
  cpu_kernel().attend({q, k, v, p.map, p.tiles, p.factor(), out, lse, false, terms});
  attention_delta(dout, out, delta);
  const Tensor dq(DType::kF32, q->shape), dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
  cpu_kernel().attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, dq, dk, dv, terms, false, dbias});
  EXPECT_TRUE(same_bits(out, plain.out) && same_bits(dk, plain.dk) && same_bits(to_dtype(dbias, DType::kF32), plain.dbias));
}

Positions some_positions(std::int64_t limit) {
  const auto step = *rc::gen::inRange<std::int64_t>(1, 6), begin = *rc::gen::inRange<std::int64_t>(0, 40);
  const auto count = *rc::gen::inRange<std::int64_t>(1, (limit - begin) / step / 2);
  if (*rc::gen::arbitrary<bool>()) return Positions({{begin, count, step}});
  const auto gap = *rc::gen::inRange<std::int64_t>(0, 20), rest = (limit - begin - count * step - gap) / step;
  return Positions({{begin, count, step}, {begin + count * step + gap, std::max<std::int64_t>(1, rest), step}});
}

TEST_P(CpuTerms, RandomShards) {
  EXPECT_TRUE(rc::check([&] {
    const auto left = *rc::gen::inRange<std::int64_t>(-1, 150), right = *rc::gen::inRange<std::int64_t>(-1, 150);
    Problem p = placed(Mask::window(left, right), some_positions(500), some_positions(500), 500, 8, 8);
    p.softcap = *rc::gen::element(0.0, 1.0);
    if (*rc::gen::arbitrary<bool>()) p.slopes = slopes_of(4);
    if (*rc::gen::arbitrary<bool>()) p.bias = {1, p.seq_q, *rc::gen::element<std::int64_t>(1, 4), 500};
    if (*rc::gen::arbitrary<bool>()) p.dropout = {0.3, 1, 2, 3, 4};
    p.fp32_bias = *rc::gen::arbitrary<bool>();
    const Inputs inputs = random_inputs(p, DType::kBF16);
    const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
    const Results got = run_kernel(cpu_kernel(), p, inputs, DType::kF32);
    constexpr double kTolerance = 3e-5;  // ALiBi at a distance of 500 has scores of 250, exact to 1.5e-5
    RC_ASSERT(relative_error(got.out, wanted.out) < kTolerance);
    RC_ASSERT(relative_error(got.dq, wanted.dq) < kTolerance);
    RC_ASSERT(relative_error(got.dk, wanted.dk) < kTolerance);
    RC_ASSERT(relative_error(got.dv, wanted.dv) < kTolerance);
    if (p.bias.axes == 0) return;
    RC_ASSERT(relative_error(got.dbias, wanted.dbias) < kTolerance);
  }));
}

// One query and one key with s = x: lse = softcap * tanh(x / softcap), to within rounding of tanh.
TEST_P(CpuTerms, TanhIsAccurateEverywhere) {
  constexpr std::int64_t kRows = 4096;
  Problem p = make_problem(kRows, 1, 1, 1, 1, 1, Mask::full());
  p.softcap = 1;
  p.scale = 1;
  const Inputs in = random_inputs(p, DType::kF32);
  const Tensor k(DType::kF32, {1, 1, 1, 1}), out(DType::kF32, {1, kRows, 1, 1}), lse(DType::kF32, {1, 1, kRows});
  k.ptr<float>()[0] = 1;
  const Tensor q(DType::kF32, {1, kRows, 1, 1});
  for (std::int64_t i = 0; i < kRows; ++i) {
    const double x = std::exp2(-12 + 16 * static_cast<double>(i) / kRows);
    q.ptr<float>()[i] = static_cast<float>(i % 2 == 0 ? x : -x);
  }
  cpu_kernel().attend({q, k, k, {}, p.tiles, 1.0, out, lse, false, terms_of(p, in.bias)});
  double worst = 0;
  for (std::int64_t i = 0; i < kRows; ++i) {
    const double wanted = std::tanh(static_cast<double>(q.ptr<float>()[i]));
    worst = std::max(worst, std::abs(static_cast<double>(lse.ptr<float>()[i]) / wanted - 1));
  }
  EXPECT_LT(worst, 2e-7 + 2 * 6e-8);  // the way to base 2 and back rounds twice
}

DATTN_ON_EVERY_PATH(CpuTerms);

}  // namespace
}  // namespace dattn
