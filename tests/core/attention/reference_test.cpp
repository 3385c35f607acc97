// The reference kernel: numbers worked out by hand, and gradients against finite differences in fp64.
#include <gtest/gtest.h>

#include "core/base/threads.h"
#include "tests/core/attention/problem.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

// Two queries, two keys, one dim. Scores of query 0: {0, ln 3}, so p = {1/4, 3/4}; under the causal mask query 0 sees
// key 0 only. Query 1 has scores {0, 2 ln 3}: p = {1/10, 9/10}.
struct Hand {
  Tensor q{DType::kF64, {1, 2, 1, 1}}, k{DType::kF64, {1, 2, 1, 1}}, v{DType::kF64, {1, 2, 1, 1}};
  Tensor out{DType::kF64, {1, 2, 1, 1}}, lse{DType::kF64, {1, 1, 2}};
  HeadMap heads;
  const double ln3 = std::log(3.0);

  Hand() {
    q.ptr<double>()[0] = 1;
    q.ptr<double>()[1] = 2;
    k.ptr<double>()[0] = 0;
    k.ptr<double>()[1] = ln3;
    v.ptr<double>()[0] = 4;
    v.ptr<double>()[1] = 8;
  }
  void attend(const std::vector<Tile>& tiles, bool merge = false) {
    reference_kernel().attend({q, k, v, heads, tiles, 1.0, out, lse, merge});
  }
};

TEST(Reference, FullByHand) {
  Hand h;
  h.attend(tiles_of(Mask::full(), 2, 2));
  EXPECT_NEAR(h.out.ptr<double>()[0], 7.0, 1e-14);  // 4/4 + 8*3/4
  EXPECT_NEAR(h.out.ptr<double>()[1], 7.6, 1e-14);  // 4/10 + 8*9/10
  EXPECT_NEAR(h.lse.ptr<double>()[0], std::log(4.0), 1e-14);
  EXPECT_NEAR(h.lse.ptr<double>()[1], std::log(10.0), 1e-14);
}

TEST(Reference, CausalByHand) {
  Hand h;
  h.attend(tiles_of(Mask::causal(), 2, 2));
  EXPECT_NEAR(h.out.ptr<double>()[0], 4.0, 1e-14);
  EXPECT_NEAR(h.lse.ptr<double>()[0], 0.0, 1e-14);
  EXPECT_NEAR(h.out.ptr<double>()[1], 7.6, 1e-14);
}

TEST(Reference, GradientByHand) {
  Hand h;
  const auto tiles = tiles_of(Mask::full(), 2, 2);
  h.attend(tiles);
  Tensor dout(DType::kF64, {1, 2, 1, 1}), delta(DType::kF64, {1, 1, 2});
  dout.ptr<double>()[0] = 1;  // query 1 gets no gradient
  attention_delta(dout, h.out, delta);
  EXPECT_NEAR(delta.ptr<double>()[0], 7.0, 1e-14);
  const Tensor dq(DType::kF64, {1, 2, 1, 1}), dk(DType::kF64, {1, 2, 1, 1}), dv(DType::kF64, {1, 2, 1, 1});
  reference_kernel().attend_grad({h.q, h.k, h.v, h.heads, tiles, 1.0, dout, h.lse, delta, dq, dk, dv});
  // ds = {1/4 (4 - 7), 3/4 (8 - 7)} = {-3/4, 3/4}
  EXPECT_NEAR(dq.ptr<double>()[0], 0.75 * h.ln3, 1e-14);
  EXPECT_EQ(dq.ptr<double>()[1], 0.0);
  EXPECT_NEAR(dk.ptr<double>()[0], -0.75, 1e-14);
  EXPECT_NEAR(dk.ptr<double>()[1], 0.75, 1e-14);
  EXPECT_NEAR(dv.ptr<double>()[0], 0.25, 1e-14);
  EXPECT_NEAR(dv.ptr<double>()[1], 0.75, 1e-14);
}

TEST(Reference, RowsThatSeeNothing) {
  Hand h;
  h.out.ptr<double>()[1] = 5;
  const std::vector<Tile> tiles = {{{{0, 1}, {0, 2}}}};
  h.attend(tiles);
  EXPECT_EQ(h.out.ptr<double>()[1], 0.0);
  EXPECT_EQ(h.lse.ptr<double>()[1], -std::numeric_limits<double>::infinity());
  const Tensor dq(DType::kF64, {1, 2, 1, 1}), dk(DType::kF64, {1, 2, 1, 1}), dv(DType::kF64, {1, 2, 1, 1});
  Tensor dout(DType::kF64, {1, 2, 1, 1}), delta(DType::kF64, {1, 1, 2});
  dout.ptr<double>()[1] = 3;
  const std::vector<Tile> all = tiles_of(Mask::full(), 2, 2);  // even where tiles name the row: lse says it saw nothing
  reference_kernel().attend_grad({h.q, h.k, h.v, h.heads, all, 1.0, dout, h.lse, delta, dq, dk, dv});
  EXPECT_EQ(dq.ptr<double>()[1], 0.0);
  EXPECT_EQ(dv.ptr<double>()[0], 0.0);
}

TEST(Reference, MergeFoldsPiecesInAnyOrder) {
  Hand h;
  clear_state(h.out, h.lse);
  for (const std::int64_t key : {1, 0}) h.attend({{{{0, 2}, {key, key + 1}}}}, true);
  EXPECT_NEAR(h.out.ptr<double>()[0], 7.0, 1e-14);
  EXPECT_NEAR(h.out.ptr<double>()[1], 7.6, 1e-14);
  EXPECT_NEAR(h.lse.ptr<double>()[1], std::log(10.0), 1e-14);
}

// sum of out * dout as a function of the inputs.
double loss(const Problem& p, const Inputs& inputs) {
  const Tensor out(DType::kF64, {p.batch, p.seq_q, p.heads, p.dim_v}), lse(DType::kF64, {p.batch, p.heads, p.seq_q});
  reference_kernel().attend({inputs.q, inputs.k, inputs.v, p.map, p.tiles, p.factor(), out, lse, false});
  double sum = 0;
  for (std::int64_t i = 0; i < out->elements(); ++i) sum += out.ptr<double>()[i] * inputs.dout.ptr<double>()[i];
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
    EXPECT_NEAR(gradient.ptr<double>()[i], (above - below) / (2 * kStep), 1e-8) << name << "[" << i << "]";
  }
}

TEST(Reference, GradientsAreFiniteDifferences) {
  const int threads = num_threads();
  set_num_threads(1);  // thousands of tiny calls
  Problem p = make_problem(7, 9, 4, 2, 3, 5, Mask::window(3, 2));
  p.batch = 2;
  const Inputs inputs = random_inputs(p, DType::kF64);
  const Results r = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  expect_slope(p, inputs, inputs.q, r.dq, "dq");
  expect_slope(p, inputs, inputs.k, r.dk, "dk");
  expect_slope(p, inputs, inputs.v, r.dv, "dv");
  set_num_threads(threads);
}

TEST(Reference, StorageTypesAgree) {
  const Problem p = make_problem(20, 30, 4, 2, 8, 12, Mask::full());
  const Inputs inputs = random_inputs(p, DType::kBF16);
  const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Results got = run_kernel(reference_kernel(), p, inputs, storage);
    EXPECT_LE(relative_error(got.out, wanted.out), 1e-7);
    EXPECT_LE(relative_error(got.dk, wanted.dk), 1e-6);
  }
}

}  // namespace
}  // namespace dattn
