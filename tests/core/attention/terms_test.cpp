// Softcap, ALiBi, bias and dropout in the reference kernel: numbers worked out by hand, gradients against finite
// differences in fp64; what callers get wrong, in every kernel.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/attention/dropout.h"
#include "core/base/error.h"
#include "core/base/threads.h"
#include "tests/core/attention/problem.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

// One query at position 1 sees keys at positions 0 and 1 with products 0 and ln 3; v = {4, 8}.
struct Hand {
  Tensor q{DType::kF64, {1, 1, 1, 1}}, k{DType::kF64, {1, 2, 1, 1}}, v{DType::kF64, {1, 2, 1, 1}};
  Tensor out{DType::kF64, {1, 1, 1, 1}}, lse{DType::kF64, {1, 1, 1}}, bias{DType::kF64, {1, 1, 1, 2}};
  std::vector<Tile> tiles{{{{0, 1}, {0, 2}}, 1, 0, 1}};
  const double ln3 = std::log(3.0);

  Hand() {
    q.ptr<double>()[0] = 1;
    k.ptr<double>()[1] = ln3;
    v.ptr<double>()[0] = 4;
    v.ptr<double>()[1] = 8;
  }
  // Weights of the two keys, before they are divided by their sum.
  void expect(const ScoreTerms& terms, double a, double b) {
    reference_kernel().attend({q, k, v, {}, tiles, 1.0, out, lse, false, terms});
    EXPECT_NEAR(out.ptr<double>()[0], (4 * a + 8 * b) / (a + b), 1e-14);
    EXPECT_NEAR(lse.ptr<double>()[0], std::log(a + b), 1e-14);
  }
};

TEST(ScoreTerms, AloneByHand) {
  Hand h;
  ScoreTerms terms;
  EXPECT_FALSE(terms.any());
  h.expect(terms, 1, 3);
  terms.softcap = h.ln3;
  h.expect(terms, 1, std::exp(h.ln3 * std::tanh(1.0)));
  const std::vector<double> slopes{h.ln3};
  terms = {};
  terms.alibi_slopes = slopes;
  h.expect(terms, 1.0 / 3, 3);  // key 0 is one before the query
  h.bias.ptr<double>()[0] = std::log(5.0);
  terms = {};
  terms.bias = h.bias;
  h.expect(terms, 5, 3);
}

TEST(ScoreTerms, InOrderByHand) {
  Hand h;
  const std::vector<double> slopes{h.ln3};
  h.bias.ptr<double>()[1] = std::log(2.0);
  ScoreTerms terms;
  terms.softcap = h.ln3;
  terms.alibi_slopes = slopes;
  terms.bias = h.bias;
  h.expect(terms, 1.0 / 3, 2 * std::exp(h.ln3 * std::tanh(1.0)));
}

TEST(ScoreTerms, DropoutByHand) {
  Hand h;
  ScoreTerms terms;
  terms.dropout.p = 0.5;
  bool seen[2][2] = {};
  for (terms.dropout.seed = 0; terms.dropout.seed < 20; ++terms.dropout.seed) {
    const bool a = keeps(terms.dropout, 0, 0, 1, 0), b = keeps(terms.dropout, 0, 0, 1, 1);
    seen[a ? 1 : 0][b ? 1 : 0] = true;
    reference_kernel().attend({h.q, h.k, h.v, {}, h.tiles, 1.0, h.out, h.lse, false, terms});
    EXPECT_NEAR(h.out.ptr<double>()[0], 2 * (4 * (a ? 0.25 : 0) + 8 * (b ? 0.75 : 0)), 1e-14);
    EXPECT_NEAR(h.lse.ptr<double>()[0], std::log(4.0), 1e-14);
  }
  EXPECT_TRUE(seen[0][0] && seen[0][1] && seen[1][0] && seen[1][1]);
}

TEST(ScoreTerms, BiasMayHide) {
  Hand h;
  h.bias.ptr<double>()[1] = -std::numeric_limits<double>::infinity();
  ScoreTerms terms;
  terms.bias = h.bias;
  h.expect(terms, 1, 0);
}

double loss(const Problem& p, const Inputs& in) {
  const Tensor out(DType::kF64, {p.batch, p.seq_q, p.heads, p.dim_v}), lse(DType::kF64, {p.batch, p.heads, p.seq_q});
  reference_kernel().attend({in.q, in.k, in.v, p.map, p.tiles, p.factor(), out, lse, false, terms_of(p, in.bias), p.invariant});
  double sum = 0;
  for (std::int64_t i = 0; i < out->elements(); ++i) sum += out.ptr<double>()[i] * in.dout.ptr<double>()[i];
  return sum;
}

void expect_slope(const Problem& p, const Inputs& inputs, const Tensor& input, const Tensor& gradient, const char* name) {
  constexpr double kStep = 1e-5;
  for (std::int64_t i = 0; i < input->elements(); i += 3) {
    double& x = input.ptr<double>()[i];
    const double kept = x;
    x = kept + kStep;
    const double above = loss(p, inputs);
    x = kept - kStep;
    const double below = loss(p, inputs);
    x = kept;
    EXPECT_NEAR(gradient.ptr<double>()[i], (above - below) / (2 * kStep), 2e-8) << name << "[" << i << "]";
  }
}

// Striped rows, so that positions are no row numbers; query heads 2 to 5 of 6.
Problem small_problem() {
  Problem p = make_problem(5, 6, 4, 2, 3, 4, Mask::full());
  p.batch = 2;
  p.map = {2, 1, 2};
  p.tiles = make_tiles(compile(Mask::window(8, 4), 16, 16), Positions({{1, 5, 3}}), Positions({{0, 6, 3}}));
  return p;
}

TEST(ScoreTerms, GradientsAreFiniteDifferences) {
  const int threads = num_threads();
  set_num_threads(1);  // thousands of tiny calls
  for (const Shape& bias : {Shape{}, Shape{2, 5, 4, 16}, Shape{1, 5, 4, 16}, Shape{2, 5, 1, 16}, Shape{1, 5, 1, 16}}) {
    Problem p = small_problem();
    p.softcap = 0.7;
    p.slopes = {9, 9, 0.5, 0.25, 0.125, 0.0625};
    p.bias = bias;
    p.dropout = {0.3, 5, 2, 3, 6};
    for (const bool invariant : {false, true}) {
      p.invariant = invariant;
      const Inputs inputs = random_inputs(p, DType::kF64);
      const Results r = run_kernel(reference_kernel(), p, inputs, DType::kF64);
      expect_slope(p, inputs, inputs.q, r.dq, "dq");
      expect_slope(p, inputs, inputs.k, r.dk, "dk");
      expect_slope(p, inputs, inputs.v, r.dv, "dv");
      if (bias.axes > 0) expect_slope(p, inputs, inputs.bias, r.dbias, "dbias");
    }
  }
  set_num_threads(threads);
}

TEST(ScoreTerms, UnwantedGradientsMayBeLeftOut) {
  Problem p = small_problem();
  p.bias = {1, 5, 1, 16};
  p.dropout = {0.3, 5, 2, 3, 6};
  for (const AttentionKernel* kernel : attention_kernels()) {
    const Inputs in = random_inputs(p, DType::kF32);
    const Results all = run_kernel(*kernel, p, in, DType::kF32);
    const Tensor q = to_dtype(in.q, DType::kF32), k = to_dtype(in.k, DType::kF32), v = to_dtype(in.v, DType::kF32);
    const Tensor dout = to_dtype(in.dout, DType::kF32), bias = to_dtype(in.bias, DType::kF32), delta(DType::kF32, {2, 4, 5});
    attention_delta(dout, all.out, delta);
    for (int wanted = 0; wanted < 8; ++wanted) {
      Tensor dq, dk, dv, dbias;
      if (wanted & 1) dq = Tensor(DType::kF32, q->shape);
      if (wanted & 2) dk = Tensor(DType::kF32, k->shape);
      if (wanted & 2) dv = Tensor(DType::kF32, v->shape);
      if (wanted & 4) dbias = Tensor(DType::kF32, bias->shape);
      kernel->attend_grad(
          {q, k, v, p.map, p.tiles, p.factor(), dout, all.lse, delta, dq, dk, dv, terms_of(p, bias), false, dbias});
      if (wanted & 1) {
        EXPECT_EQ(relative_error(dq, all.dq), 0) << kernel->name();
      }
      if (wanted & 2) {
        EXPECT_EQ(relative_error(dk, all.dk), 0) << kernel->name();
      }
      if (wanted & 2) {
        EXPECT_EQ(relative_error(dv, all.dv), 0) << kernel->name();
      }
      if (wanted & 4) {
        EXPECT_EQ(relative_error(dbias, all.dbias), 0) << kernel->name();
      }
    }
  }
}

TEST(ScoreTerms, WrongTermsAreNamed) {
  const Problem p = small_problem();
  const Inputs in = random_inputs(p, DType::kF32);
  const Tensor q = to_dtype(in.q, DType::kF32), k = to_dtype(in.k, DType::kF32), v = to_dtype(in.v, DType::kF32);
  const Tensor out(DType::kF32, {2, 5, 4, 4}), lse(DType::kF32, {2, 4, 5});
  const auto message = [&](const AttentionKernel& kernel, const ScoreTerms& terms) -> std::string {
    try {
      kernel.attend({q, k, v, p.map, p.tiles, 1.0, out, lse, false, terms});
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  for (const AttentionKernel* kernel : attention_kernels()) {
    const auto expect = [&](const ScoreTerms& terms, const char* text) {
      EXPECT_THAT(message(*kernel, terms), ::testing::HasSubstr(text));
    };
    ScoreTerms terms;
    terms.softcap = -1;
    expect(terms, "softcap is -1");
    const std::vector<double> slopes(5, 1.0);
    terms = {};
    terms.alibi_slopes = slopes;
    expect(terms, "5 alibi slopes for heads up to 5");
    const Tensor narrow(DType::kF32, {1, 5, 4, 15}), wide(DType::kF32, {1, 5, 3, 16}), doubles(DType::kF64, {1, 5, 4, 16});
    terms = {};
    terms.bias = narrow;
    expect(terms, "the bias has 15 columns, keys have positions up to 15");
    terms.bias = wide;
    expect(terms, "bias has shape [1, 5, 3, 16]");
    terms.bias = doubles;
    expect(terms, "the bias has type fp64");
    terms = {};
    terms.dropout = {1.0, 0, 0, 0, 6};
    expect(terms, "dropout p is 1");
    terms.dropout = {0.5, 0, std::uint64_t{1} << 32, 0, 6};
    expect(terms, "dropout stream");
    terms.dropout = {0.5, 0, 0, 0, 5};
    expect(terms, "heads up to 5 of 5");
    terms.dropout = {0.5, 0, 0, 0, 6};
    expect(terms, "no error");
  }
}

}  // namespace
}  // namespace dattn
