#include "core/attention/cpu/split_states.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

}  // namespace

SplitStates::SplitStates(const AttendArgs& args, std::int64_t splits, std::int64_t width)
    : splits_(splits), rows_(args.q.size(1)), heads_(args.q.size(2)), width_(width) {
  const std::int64_t count = args.q.size(0) * heads_ * splits_ * rows_;
  out_ = Tensor::uninitialized(DType::kF32, {count * width_});
  top_ = Tensor::uninitialized(DType::kF32, {count});
  sum_ = Tensor::uninitialized(DType::kF32, {count});
}

RowStates SplitStates::at(std::int64_t b, std::int64_t h, std::int64_t split, std::int64_t row) const {
  const std::int64_t first = ((b * heads_ + h) * splits_ + split) * rows_ + row;
  return {out_.ptr<float>() + first * width_, top_.ptr<float>() + first, sum_.ptr<float>() + first};
}

void SplitStates::finish(const AttendArgs& args) const {
  constexpr std::int64_t kRows = 16;  // one task: enough work to be worth handing out
  const std::int64_t pieces = div_up(rows_, kRows);
  parallel_for(args.q.size(0) * heads_ * pieces, [&](std::int64_t task) {
    const std::int64_t head = task / pieces, first = task % pieces * kRows;
    for (std::int64_t row = first; row < std::min(first + kRows, rows_); ++row)
      finish_row(args, head / heads_, head % heads_, row);
  });
}

void SplitStates::finish_row(const AttendArgs& args, std::int64_t b, std::int64_t h, std::int64_t row) const {
  const std::int64_t dim = args.v.size(3);
  float& lse = args.lse.at<float>(b, h, row);
  const float old = args.merge ? lse * kLog2e : kNothing;
  float top = old;
  bool seen = false;
  for (std::int64_t split = 0; split < splits_; ++split) {
    const RowStates from = at(b, h, split, row);
    top = std::max(top, *from.top);
    seen = seen || *from.sum != 0;
  }
  if (args.merge && !seen) return;
  float* out = &args.out.at<float>(b, row, h);
  const float keep = old == kNothing ? 0.0f : std::exp2(old - top);
  const auto kept = static_cast<float>(1 / (1 - args.terms.dropout.p));
  float sum = keep;
  for (std::int64_t d = 0; d < dim; ++d) out[d] = keep == 0 ? 0.0f : keep * out[d];
  for (std::int64_t split = 0; split < splits_; ++split) {
    const RowStates from = at(b, h, split, row);
    if (*from.sum == 0) continue;
    const float weight = std::exp2(*from.top - top);
    sum += weight * *from.sum;
    for (std::int64_t d = 0; d < dim; ++d) out[d] += kept * weight * from.out[d];
  }
  for (std::int64_t d = 0; d < dim && sum != 0; ++d) out[d] /= sum;
  lse = sum == 0 ? kNothing : (top + std::log2(sum)) * kLn2;
}

}  // namespace dattn::cpu
