// What the cpu kernel's calls hold grows with the sequence, not with its square.
#include <gtest/gtest.h>

#include "core/attention/state.h"
#include "tests/core/attention/problem.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

// The most that tensors hold in a forward and a backward pass of one head, D = 64, inputs and gradients included. A window,
// which takes little time: what is packed and kept is that of any mask.
std::int64_t peak_of(std::int64_t seq) {
  const TensorMeter meter;
  const std::vector<Tile> tiles = tiles_of(Mask::window(63, 0), seq, seq);
  const Shape rows{1, seq, 1, 64}, sums{1, 1, seq};
  const Tensor q(DType::kF32, rows), k(DType::kF32, rows), v(DType::kF32, rows), dout(DType::kF32, rows);
  const Tensor out(DType::kF32, rows), lse(DType::kF32, sums), delta(DType::kF32, sums);
  const Tensor dq(DType::kF32, rows), dk(DType::kF32, rows), dv(DType::kF32, rows);
  cpu_kernel().attend({q, k, v, {}, tiles, 0.125, out, lse});
  attention_delta(dout, out, delta);
  cpu_kernel().attend_grad({q, k, v, {}, tiles, 0.125, dout, lse, delta, dq, dk, dv});
  return meter.peak();
}

TEST(CpuMemory, IsLinearInTheSequence) {
  constexpr std::int64_t kSeq = 65'536;
  const std::int64_t whole = peak_of(kSeq), half = peak_of(kSeq / 2);
  EXPECT_LT(whole, 200'000'000);
  EXPECT_LT(static_cast<double>(whole), 2.1 * static_cast<double>(half));
  EXPECT_GT(whole, 8 * kSeq * 64 * 4);  // the tensors alone: the meter sees them
}

}  // namespace
}  // namespace dattn
