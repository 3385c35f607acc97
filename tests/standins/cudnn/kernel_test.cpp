// The kernel `cudnn` against the reference, its graphs and CUDA's runtime replaced by stand-ins on host memory: how calls are
// cut, merged, added and passed on. What cuDNN itself computes is seen on a GPU only.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/attention/cudnn/cuda/cudnn_kernel.h"
#include "core/attention/cudnn/projection.h"
#include "core/base/error.h"
#include "core/device/cuda/runtime.h"
#include "tests/core/attention/problem.h"
#include "tests/standins/cuda/tests/support.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of the attention tests

// The kernel that calls are passed on to.
class Next : public AttentionKernel {
 public:
  std::string_view name() const override { return "next"; }
  Support supports(const AttendTraits& /*traits*/) const override { return {}; }
  void attend(const AttendArgs& /*args*/) const override { ++calls; }
  void attend_grad(const AttendGradArgs& /*args*/) const override { ++calls; }
  mutable int calls = 0;
};

const Next& next() {
  static const Next kernel;
  return kernel;
}
const AttentionKernel& kernel() { return cudnn_kernel(next()); }

// A tensor on the stand-in's device, from and to fp64 on the host.
class DeviceTensor {
 public:
  DeviceTensor(DType type, const Shape& shape) : host_(type, shape), memory_(static_cast<std::size_t>(host_->bytes())) {
    upload();
  }
  DeviceTensor(const Tensor& values, DType type)
      : host_(to_dtype(values, type)), memory_(static_cast<std::size_t>(host_->bytes())) {
    upload();
  }
  TensorView view() const { return {memory_.data(), host_->dtype, host_->shape, {DeviceKind::kCuda, 0}}; }
  operator TensorView() const { return view(); }  // NOLINT: as a Tensor
  Tensor values() const {
    Tensor all = host_.clone();
    const std::vector<char> bytes = memory_.values();
    std::copy(bytes.begin(), bytes.end(), all.ptr<char>());
    return all;
  }

 private:
  void upload() {
    cuda::check(
        cudaMemcpyAsync(memory_.data(), host_->data, static_cast<std::size_t>(host_->bytes()), cudaMemcpyDefault, nullptr),
        "copy");
    cuda::check(cudaStreamSynchronize(nullptr), "synchronise");
  }
  Tensor host_;
  cuda::Array<char> memory_;
};

class CudnnKernel : public ::testing::Test {
 protected:
  CudnnKernel() {
    static const CudaHost host{&error_context, [] { return NativeStream{nullptr}; }, [] { return false; }};
    cuda::bind_host(&host);
    cuda::set_device(0);
  }

  static Results run(const Problem& p, const Inputs& in, bool repeatable = false, DType storage = DType::kBF16) {
    const DeviceTensor q(in.q, storage), k(in.k, storage), v(in.v, storage), dout(in.dout, storage);
    const DeviceTensor bias(in.bias.defined() ? in.bias.clone() : Tensor(DType::kF64, {1, 1, 1, 1}), storage);
    ScoreTerms terms;
    terms.softcap = p.softcap;
    if (in.bias.defined()) terms.bias = bias;
    const Shape stats{p.batch, p.heads, p.seq_q};
    const DeviceTensor out(DType::kF32, {p.batch, p.seq_q, p.heads, p.dim_v}), lse(DType::kF32, stats),
        delta(DType::kF32, stats);
    const DeviceTensor dq(DType::kF32, in.q->shape), dk(DType::kF32, in.k->shape), dv(DType::kF32, in.v->shape);
    kernel().attend({q, k, v, p.map, p.tiles, p.factor(), out, lse, false, terms});
    cuda::attention_delta(dout, out, delta, nullptr);
    AttendGradArgs grad{q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, dq, dk, dv, terms};
    grad.repeatable = repeatable;
    kernel().attend_grad(grad);
    cuda::synchronize(nullptr);
    return {out.values(), lse.values(), dq.values(), dk.values(), dv.values()};
  }

  // No step of the problem is passed on, and all results are the reference's.
  static void check(const Problem& p, const std::string& what) {
    SCOPED_TRACE(what);
    const int passed_on = next().calls;
    const Inputs in = random_inputs(p, DType::kBF16);
    const Results want = run_kernel(reference_kernel(), p, in, DType::kF64);
    for (const DType storage : {DType::kBF16, DType::kF16}) {
      SCOPED_TRACE(name_of(storage));
      const Results got = run(p, in, false, storage);
      const double rounding = storage == DType::kBF16 ? 1e-3 : 1.25e-4;
      EXPECT_EQ(next().calls, passed_on);
      EXPECT_LT(relative_error(got.out, want.out), 3 * rounding);
      EXPECT_LT(relative_error(got.lse, want.lse), 1e-5);
      EXPECT_LT(relative_error(got.dq, want.dq), 4 * rounding);
      EXPECT_LT(relative_error(got.dk, want.dk), 4 * rounding);
      EXPECT_LT(relative_error(got.dv, want.dv), 4 * rounding);
    }
  }
};

Problem placed(const Mask& mask, const Positions& queries, const Positions& keys) {
  Problem p = make_problem(queries.count(), keys.count(), 4, 2, 16, 24, Mask::full());
  p.batch = 2;
  p.tiles = make_tiles(compile(mask, 600, 600), queries, keys);
  return p;
}

TEST_F(CudnnKernel, Masks) {
  const Positions all = Positions::range(0, 90), late = Positions::range(60, 170);
  check(placed(Mask::causal(), all, all), "causal");
  check(placed(Mask::window(20, 5), all, all), "window");
  check(placed(Mask::window(20, 5), late, all), "window, keys before");
  check(placed(Mask::prefix(30), all, late), "prefix, of which some rows see nothing");
  check(placed(Mask::documents({0, 40, 90}, Mask::causal()), all, all), "documents");
  check(placed(Mask::causal(), Positions({{1, 80, 4}}), Positions({{2, 80, 4}})), "striped");
  check(placed(Mask::causal(), Positions({{40, 40, 1}, {400, 40, 1}}), Positions({{80, 40, 1}, {360, 40, 1}})), "zigzag");
}

TEST_F(CudnnKernel, HeadsThatDoNotShareEvenly) {
  Problem p = make_problem(70, 80, 7, 3, 16, 16, Mask::causal());
  p.map = {3, 0, 4};
  check(p, "query heads 3 to 9 of groups of 4");
}

TEST_F(CudnnKernel, Bias) {
  Problem p = placed(Mask::causal(), Positions::range(64, 136), Positions::range(32, 128));
  for (const Shape& shape : {Shape{2, 72, 4, 160}, Shape{1, 72, 1, 160}}) {
    p.bias = shape;
    check(p, "bias " + shape.text());
  }
}

TEST_F(CudnnKernel, SeveralCallsMergeAndAdd) {
  const Mask mask = Mask::causal_bottom_right();
  const Problem whole = make_problem(96, 200, 4, 2, 16, 16, mask);
  const Inputs in = random_inputs(whole, DType::kBF16);
  const Results want = run_kernel(reference_kernel(), whole, in, DType::kF64);
  const DeviceTensor q(in.q, DType::kBF16), k(in.k, DType::kBF16), v(in.v, DType::kBF16), dout(in.dout, DType::kBF16);
  const DeviceTensor out(DType::kF32, want.out->shape), lse(DType::kF32, want.lse->shape), delta(DType::kF32, want.lse->shape);
  const auto keys = [](const TensorView& all, Interval rows) { return all.slice(1, rows.begin, rows.count()); };
  const auto tiles_of_keys = [&](Interval rows) {
    return make_tiles(compile(mask, 96, 200), Positions::range(0, 96), Positions::range(rows.begin, rows.end));
  };
  const Interval pieces[] = {{0, 60}, {60, 120}, {120, 200}};
  for (const Interval piece : pieces) {
    const std::vector<Tile> tiles = tiles_of_keys(piece);
    kernel().attend({q, keys(k, piece), keys(v, piece), whole.map, tiles, whole.factor(), out, lse, piece.begin != 0, {}});
  }
  cuda::attention_delta(dout, out, delta, nullptr);
  const DeviceTensor dq(want.dq, DType::kF32), dk(want.dk, DType::kF32), dv(want.dv, DType::kF32);  // what is there is added to
  for (const Interval piece : pieces) {
    const std::vector<Tile> tiles = tiles_of_keys(piece);
    kernel().attend_grad({q, keys(k, piece), keys(v, piece), whole.map, tiles, whole.factor(), dout, lse, delta, dq,
                          keys(dk, piece), keys(dv, piece)});
  }
  cuda::synchronize(nullptr);
  EXPECT_LT(relative_error(out.values(), want.out), 3e-3);
  EXPECT_LT(relative_error(lse.values(), want.lse), 1e-5);
  const std::pair<const DeviceTensor*, const Tensor*> gradients[] = {{&dq, &want.dq}, {&dk, &want.dk}, {&dv, &want.dv}};
  for (const auto& [got, once] : gradients) {
    const Tensor twice = once->clone();
    add(*once, twice);
    EXPECT_LT(relative_error(got->values(), twice), 4e-3);
  }
}

TEST_F(CudnnKernel, WhatItDoesNotTakeGoesOn) {
  Problem p = make_problem(96, 96, 2, 2, 16, 16, Mask::causal());
  const Inputs in = random_inputs(p, DType::kBF16);
  const int before = next().calls;
  p.softcap = 2;
  run(p, in);
  EXPECT_EQ(next().calls, before + 2);
  p.softcap = 0;
  const DeviceTensor wide(DType::kBF16, {1, 96, 2, 24}), out(DType::kF32, {1, 96, 2, 16}), lse(DType::kF32, {1, 2, 96});
  const TensorView good = wide.view().slice(3, 0, 16);
  const auto passes_on = [&](const TensorView& q) {
    const int calls = next().calls;
    kernel().attend({q, good, good, p.map, p.tiles, 1.0, out, lse, false, {}});
    return next().calls == calls + 1;
  };
  EXPECT_FALSE(passes_on(good));
  EXPECT_TRUE(passes_on(wide.view().slice(3, 4, 16))) << "starts at a multiple of 8 bytes only";
  for (const std::size_t axis : {0, 1, 2}) {
    TensorView odd = good;
    odd.strides[axis] -= 4;
    EXPECT_TRUE(passes_on(odd)) << "stride of axis " << axis << " is a multiple of 8 bytes only";
  }
  EXPECT_FALSE(kernel().supports({DType::kF32, 64, 64, {DeviceKind::kCuda, 0}}).ok);
  EXPECT_FALSE(kernel().supports({DType::kBF16, 68, 64, {DeviceKind::kCuda, 0}}).ok);
  EXPECT_TRUE(kernel().supports({DType::kBF16, 192, 128, {DeviceKind::kCuda, 0}}).ok);
  EXPECT_TRUE(kernel().supports({DType::kF16, 64, 64, {DeviceKind::kCuda, 0}}).ok);
}

TEST_F(CudnnKernel, DeterminismThatNeedsTooMuchMemoryGoesOn) {
  const int before = next().calls;
  const Problem p = make_problem(64, 64, 1, 1, 8, 8, Mask::causal());
  const Results off = run(p, random_inputs(p, DType::kBF16), false), on = run(p, random_inputs(p, DType::kBF16), true);
  EXPECT_EQ(relative_error(off.dk, on.dk), 0);
  EXPECT_EQ(next().calls, before);
  const std::int64_t rows = 1 << 16;  // the stand-in asks for a byte a pair
  const Tile tile{{{0, rows}, {0, rows}, -kUnbounded, 0}, 0, 0};
  const DeviceTensor x(DType::kBF16, {1, rows, 1, 8}), stats(DType::kF32, {1, 1, rows}), sum(DType::kF32, {1, rows, 1, 8});
  kernel().attend_grad({x, x, x, {}, std::span(&tile, 1), 1.0, x, stats, stats, sum, sum, sum});
  EXPECT_EQ(next().calls, before + 1);
}

// Product with dout, the bound, and what a rounded out would give.
TEST_F(CudnnKernel, TheProjectionHasDeltaAndNothingElse) {
  const Shape shape{2, 33, 3, 72}, stats{2, 3, 33};
  Tensor dout = random_tensor(shape, 1, 1.0f, DType::kBF16), out = random_tensor(shape, 2, 1.0f, DType::kF32);
  for (std::int64_t d = 0; d < 72; ++d) {
    dout.ptr<double>()[d] = 0;                      // a row that got no gradient
    dout.ptr<double>()[72 + d] *= std::exp2(-120);  // and one of which squares vanish
  }
  const DeviceTensor device_dout(dout, DType::kBF16), device_out(out, DType::kF32), delta(DType::kF32, stats),
      projected(DType::kBF16, shape), product(DType::kF32, stats);
  cuda::attention_delta(device_dout, device_out, delta, nullptr);
  cudnn::project(device_dout, delta, projected, nullptr);
  cuda::attention_delta(device_dout, projected, product, nullptr);
  cuda::synchronize(nullptr);
  const Tensor want = delta.values(), got = product.values();
  for (std::int64_t i = 0; i < want->elements(); ++i)
    EXPECT_NEAR(got.ptr<float>()[i], want.ptr<float>()[i], std::exp2(-9) * std::abs(want.ptr<float>()[i])) << i;
  EXPECT_LT(relative_error(got, want), 1e-3);
}

}  // namespace
}  // namespace dattn
