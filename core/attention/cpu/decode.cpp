// Decode driver: a few query rows. One task is one range of keys of one KV head, read once for all query heads of the
// group; the states of the ranges are then merged in ascending order, whatever the number of threads.
#include <cmath>
#include <limits>

#include "core/attention/cpu/band_list.h"
#include "core/attention/cpu/drive.h"
#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

// Keys of one task. Tasks of a range of keys follow each other head by head: where heads lie side by side, as in BSHD, what the
// processor fetches beside one head's rows is still near when the next head wants it.
constexpr std::int64_t kSplitKeys = 256;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// States that are not normalised: out [tasks][rows][V padded], top and sum [tasks][rows]; tasks = [B, H, splits].
struct States {
  std::int64_t splits, rows, width;
  Tensor out, top, sum;

  std::int64_t row(std::int64_t head, std::int64_t split, std::int64_t r) const { return (head * splits + split) * rows + r; }
};

// Merges the splits of one row and writes it.
void finish(const AttendArgs& args, const States& states, std::int64_t b, std::int64_t h, std::int64_t r, bool touched) {
  if (args.merge && !touched) return;
  const std::int64_t head = b * args.q.size(2) + h, dim = args.v.size(3);
  float& lse = args.lse.at<float>(b, h, r);
  const float old = args.merge ? lse * 1.44269504088896341f : kNothing;
  float top = old;
  for (std::int64_t s = 0; s < states.splits; ++s) top = std::max(top, states.top.ptr<float>()[states.row(head, s, r)]);
  float* out = &args.out.at<float>(b, r, h);
  const float keep = old == kNothing ? 0.0f : std::exp2(old - top);
  float sum = keep;
  for (std::int64_t d = 0; d < dim; ++d) out[d] = keep == 0 ? 0.0f : keep * out[d];
  for (std::int64_t s = 0; s < states.splits; ++s) {
    const std::int64_t at = states.row(head, s, r);
    if (states.sum.ptr<float>()[at] == 0) continue;
    const float weight = std::exp2(states.top.ptr<float>()[at] - top);
    sum += weight * states.sum.ptr<float>()[at];
    const float kept = weight * static_cast<float>(1 / (1 - args.terms.dropout.p));
    const float* from = states.out.ptr<float>() + at * states.width;
    for (std::int64_t d = 0; d < dim; ++d) out[d] += kept * from[d];
  }
  for (std::int64_t d = 0; d < dim && sum != 0; ++d) out[d] /= sum;
  lse = sum == 0 ? kNothing : (top + std::log2(sum)) * 0.693147180559945309f;
}

}  // namespace

void attend_decode(const Path& path, const AttendArgs& args) {
  const Ops& ops = ops_for(path, args.q.dtype);
  const std::int64_t batch = args.q.size(0), rows = args.q.size(1), heads = args.q.size(2), kv_heads = args.k.size(2);
  const Interval hull = key_hull(args.tiles);
  const BandList list(args.tiles, rows, rows, hull.begin, false);
  States states{div_up(hull.count(), kSplitKeys), rows, padded_to(args.v.size(3), ops.lanes), {}, {}, {}};
  const std::int64_t n_states = batch * heads * states.splits * rows;
  states.out = Tensor::uninitialized(DType::kF32, {n_states * states.width});
  states.top = Tensor::uninitialized(DType::kF32, {n_states});
  states.sum = Tensor::uninitialized(DType::kF32, {n_states});
  const std::int64_t scratch_bytes = ops.decode_scratch(args.q.size(3), args.v.size(3));
  parallel_for(batch * kv_heads * states.splits, [&](std::int64_t task) {
    const std::int64_t kv = task % kv_heads, split = task / kv_heads % states.splits, b = task / kv_heads / states.splits;
    const std::int64_t begin = split * kSplitKeys, count = std::min(kSplitKeys, hull.count() - begin);
    std::vector<Band> bands;
    list.in_range(0, begin, begin + count, bands);
    for (std::int64_t h = 0; h < heads; ++h) {
      if (args.heads.kv_of(h) != kv) continue;
      const std::int64_t at = states.row(b * heads + h, split, 0);
      DecodeJob job{};
      job.q = rows_of(args.q, b, 0, rows, h);
      job.k = rows_of(args.k, b, hull.begin + begin, count, kv);
      job.v = rows_of(args.v, b, hull.begin + begin, count, kv);
      job.bands = bands.data();
      job.n_bands = static_cast<std::int64_t>(bands.size());
      job.scale_log2 = base2_factor(args.scale, args.terms);
      job.scale_sign = args.scale < 0 ? -1.0f : 1.0f;
      const Terms terms = terms_of(args.terms, args.scale, args.heads, b, 0, h);
      job.terms = args.terms.any() ? &terms : nullptr;
      job.out = states.out.ptr<float>() + at * states.width;
      job.top = states.top.ptr<float>() + at;
      job.sum = states.sum.ptr<float>() + at;
      job.scratch = scratch(scratch_bytes);
      ops.decode(job);
    }
  });
  parallel_for(batch * heads, [&](std::int64_t head) {
    for (std::int64_t r = 0; r < rows; ++r) finish(args, states, head / heads, head % heads, r, hull.count() > 0);
  });
}

}  // namespace dattn::cpu
