// States on a CUDA device, against the cpu: equal but for the last bits of exp, log and the order of sums.
#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "core/attention/state.h"
#include "tests/core/attention/problem.h"
#include "tests/core/device/on_cuda.h"

namespace dattn {
namespace {

using testing::kCuda;
using testing::random_tensor;
using testing::relative_error;

// 2 rows of the batch, 37 positions, 3 heads, 70 columns: no multiple of what a block or a warp takes. out lies in memory as
// [B, H, S, V].
constexpr std::int64_t kBatch = 2, kSeq = 37, kHeads = 3, kDim = 70;

struct State {
  Tensor out, lse;

  State(DType dtype, std::uint64_t seed)
      : out(random_tensor(dtype, {kBatch, kHeads, kSeq, kDim}, seed)),
        lse(random_tensor(dtype, {kBatch, kHeads, kSeq}, seed + 1)) {
    for (std::int64_t i = static_cast<std::int64_t>(seed % 5); i < lse->elements(); i += 5) nothing_at(i);
  }
  State(const State& other, Device device) : out(to_device(other.out, device)), lse(to_device(other.lse, device)) {}

  TensorView rows() const { return out->transpose(1, 2); }
  void nothing_at(std::int64_t row) {
    const double nothing = -std::numeric_limits<double>::infinity();
    if (lse->dtype == DType::kF64)
      lse.ptr<double>()[row] = nothing;
    else
      lse.ptr<float>()[row] = static_cast<float>(nothing);
  }
};

class CudaState : public testing::OnCuda {
 protected:
  static void expect_equal(const State& cpu, const State& cuda) {
    const double tolerance = cpu.out->dtype == DType::kF64 ? 1e-13 : 1e-6;
    EXPECT_LT(relative_error(to_device(cuda.out, Device{}), cpu.out), tolerance);
    EXPECT_LT(relative_error(to_device(cuda.lse, Device{}), cpu.lse), tolerance);
  }
};

TEST_F(CudaState, MergesAndClears) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const State a(dtype, 1), b(dtype, 2);
    const State cuda_a(a, kCuda), cuda_b(b, kCuda);
    {
      const DeviceScope scope(kCuda);
      merge_state(cuda_a.rows(), cuda_a.lse, cuda_b.rows(), cuda_b.lse);
    }
    merge_state(a.rows(), a.lse, b.rows(), b.lse);
    expect_equal(a, cuda_a);
    {
      const DeviceScope scope(kCuda);
      clear_state(cuda_a.rows(), cuda_a.lse);
    }
    clear_state(a.rows(), a.lse);
    expect_equal(a, cuda_a);
  }
}

TEST_F(CudaState, Sinks) {
  const Tensor sink = random_tensor(DType::kF32, {kHeads}, 5);
  sink.ptr<float>()[1] = -std::numeric_limits<float>::infinity();
  const Tensor cuda_sink = to_device(sink, kCuda);
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const State a(dtype, 1);
    const State cuda_a(a, kCuda);
    {
      const DeviceScope scope(kCuda);
      merge_sink(cuda_a.rows(), cuda_a.lse, cuda_sink);
    }
    merge_sink(a.rows(), a.lse, sink);
    expect_equal(a, cuda_a);
  }
}

TEST_F(CudaState, SinkGradientsRepeatBitByBit) {
  const Tensor sink = random_tensor(DType::kF32, {kHeads}, 5), cuda_sink = to_device(sink, kCuda);
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor lse = random_tensor(dtype, {kBatch, kHeads, 700}, 1), delta = random_tensor(dtype, {kBatch, kHeads, 700}, 2);
    const Tensor gradient = random_tensor(dtype, {kHeads}, 3);
    const Tensor cuda_gradient = to_device(gradient, kCuda), again = to_device(gradient, kCuda);
    const Tensor cuda_lse = to_device(lse, kCuda), cuda_delta = to_device(delta, kCuda);
    {
      const DeviceScope scope(kCuda);
      add_sink_gradient(cuda_lse, cuda_delta, cuda_sink, cuda_gradient);
      add_sink_gradient(cuda_lse, cuda_delta, cuda_sink, again);
    }
    add_sink_gradient(lse, delta, sink, gradient);
    const Tensor back = to_device(cuda_gradient, Device{}), back_again = to_device(again, Device{});
    EXPECT_LT(relative_error(back, gradient), dtype == DType::kF64 ? 1e-13 : 1e-6);
    EXPECT_EQ(std::memcmp(back.ptr<char>(), back_again.ptr<char>(), static_cast<std::size_t>(back->bytes())), 0);
  }
}

TEST_F(CudaState, Deltas) {
  struct Types {
    DType dout, out;
  };
  for (const auto& [grad_type, out_type] :
       {Types{DType::kF32, DType::kF32}, Types{DType::kBF16, DType::kBF16}, Types{DType::kBF16, DType::kF32},
        Types{DType::kF16, DType::kF16}, Types{DType::kF64, DType::kF64}}) {
    const Shape shape{kBatch, kHeads, kSeq, kDim};
    const Tensor dout = random_tensor(grad_type, shape, 1), out = random_tensor(out_type, shape, 2);
    const Tensor delta(accumulate_type(grad_type), {kBatch, kHeads, kSeq});
    const Tensor cuda_dout = to_device(dout, kCuda), cuda_out = to_device(out, kCuda), cuda_delta = to_device(delta, kCuda);
    {
      const DeviceScope scope(kCuda);
      attention_delta(cuda_dout->transpose(1, 2), cuda_out->transpose(1, 2), cuda_delta);
    }
    attention_delta(dout->transpose(1, 2), out->transpose(1, 2), delta);
    EXPECT_LT(relative_error(to_device(cuda_delta, Device{}), delta), grad_type == DType::kF64 ? 1e-14 : 1e-6);
  }
}

}  // namespace
}  // namespace dattn
