// States (out, lse): merging is associative and commutative with identity (0, -inf).
#include "core/attention/state.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "core/base/error.h"
#include "tests/core/attention/problem.h"

namespace dattn {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

struct State {
  Tensor out, lse;
  State(DType type, std::int64_t rows, std::int64_t dim) : out(type, {1, rows, 2, dim}), lse(type, {1, 2, rows}) {}
};

State random_state(std::uint64_t seed) {
  State s(DType::kF64, 5, 3);
  for (std::int64_t i = 0; i < 30; ++i) s.out.ptr<double>()[i] = philox_normal(seed, 0, static_cast<std::uint64_t>(i));
  for (std::int64_t i = 0; i < 10; ++i) {
    const double x = 40 * philox_normal(seed, 1, static_cast<std::uint64_t>(i));
    s.lse.ptr<double>()[i] = i == static_cast<std::int64_t>(seed % 10) ? kNothing : x;
  }
  return s;
}

State merged(const State& a, const State& b) {
  State sum(DType::kF64, 5, 3);
  copy(a.out, sum.out);
  copy(a.lse, sum.lse);
  merge_state(sum.out, sum.lse, b.out, b.lse);
  return sum;
}

bool near(const State& a, const State& b) {
  return testing::relative_error(a.out, b.out) < 1e-12 && testing::relative_error(a.lse, b.lse) < 1e-12;
}

TEST(State, MergeByHand) {
  State a(DType::kF32, 1, 1), b(DType::kF32, 1, 1);
  a.out.ptr<float>()[0] = 4;
  a.lse.ptr<float>()[0] = 0;
  b.out.ptr<float>()[0] = 8;
  b.lse.ptr<float>()[0] = std::log(3.0f);
  a.lse.ptr<float>()[1] = b.lse.ptr<float>()[1] = -std::numeric_limits<float>::infinity();
  merge_state(a.out, a.lse, b.out, b.lse);
  EXPECT_FLOAT_EQ(a.out.ptr<float>()[0], 7.0f);
  EXPECT_FLOAT_EQ(a.lse.ptr<float>()[0], std::log(4.0f));
  EXPECT_EQ(a.out.ptr<float>()[1], 0.0f);  // nothing merged with nothing
  EXPECT_EQ(a.lse.ptr<float>()[1], -std::numeric_limits<float>::infinity());
}

TEST(State, MergeIsAMonoid) {
  EXPECT_TRUE(rc::check([](std::uint64_t x, std::uint64_t y, std::uint64_t z) {
    State a = random_state(x), b = random_state(y), c = random_state(z);
    for (State* s : {&a, &b, &c}) {  // where nothing was seen, out is 0
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t r = 0; r < 5; ++r) {
          if (s->lse->at<double>(0, h, r) != kNothing) continue;
          for (std::int64_t d = 0; d < 3; ++d) s->out->at<double>(0, r, h, d) = 0;
        }
      }
    }
    RC_ASSERT(near(merged(a, b), merged(b, a)));
    RC_ASSERT(near(merged(merged(a, b), c), merged(a, merged(b, c))));
    State identity(DType::kF64, 5, 3);
    clear_state(identity.out, identity.lse);
    RC_ASSERT(near(merged(a, identity), a));
    RC_ASSERT(near(merged(identity, a), a));
  }));
}

TEST(State, DeltaOfEveryType) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    const Tensor dout = to_dtype(testing::random_tensor({2, 3, 4, 5}, 1, 1.0f, DType::kBF16), storage);
    const Tensor out = testing::random_tensor({2, 3, 4, 5}, 2, 1.0f, DType::kBF16);
    for (const DType out_type : {storage, accumulate_type(storage)}) {
      const Tensor delta(accumulate_type(storage), {2, 4, 3});
      attention_delta(dout, to_dtype(out, out_type), delta);
      const Tensor wide = to_dtype(dout, DType::kF64), got = to_dtype(delta, DType::kF64);
      double sum = 0;
      for (std::int64_t d = 0; d < 5; ++d) sum += wide->at<double>(1, 2, 3, d) * out->at<double>(1, 2, 3, d);
      EXPECT_NEAR(got->at<double>(1, 3, 2), sum, 1e-6);
    }
  }
}

TEST(State, StridedViews) {
  const State a = random_state(1), b = random_state(2), wanted = merged(a, b);
  const Tensor out(DType::kF64, {2, 1, 5, 3}), lse(DType::kF64, {5, 2, 1});
  const TensorView out_view = out->transpose(0, 1).transpose(1, 2);  // [1, 5, 2, 3]
  const TensorView lse_view = lse->transpose(0, 2);                  // [1, 2, 5]
  copy(a.out, out_view);
  copy(a.lse, lse_view);
  merge_state(out_view, lse_view, b.out, b.lse);
  EXPECT_EQ(testing::relative_error(to_dtype(out_view, DType::kF64), wanted.out), 0.0);
  EXPECT_EQ(testing::relative_error(to_dtype(lse_view, DType::kF64), wanted.lse), 0.0);
}

TEST(State, UnequalStatesAreRefused) {
  const State a(DType::kF32, 3, 4), b(DType::kF32, 2, 4), c(DType::kF64, 3, 4);
  EXPECT_THROW(merge_state(a.out, a.lse, b.out, b.lse), Error);
  EXPECT_THROW(merge_state(a.out, a.lse, c.out, c.lse), Error);
}

}  // namespace
}  // namespace dattn
