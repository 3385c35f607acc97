// Decode driver: a few query rows. One task is one range of keys, read once for all query rows and heads; the states of the
// ranges are then merged.
#include <algorithm>

#include "core/attention/cpu/band_list.h"
#include "core/attention/cpu/drive.h"
#include "core/attention/cpu/split_states.h"
#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

// Whether all heads of a position are one run of memory, as in BSHD. They are then read together: head by head, a row is too
// short for what the processor fetches ahead, and a third of memory's bandwidth is all that is left.
bool heads_are_one_run(const TensorView& view) {
  return view.stride(2) == view.size(3) && view.stride(1) == view.size(2) * view.size(3);
}

// As many keys as lie with their values in so much memory, whatever the heads are, in whole steps.
std::int64_t keys_in(std::int64_t bytes, const AttendArgs& args, std::int64_t kv_heads, std::int64_t most) {
  constexpr std::int64_t kStep = 64;
  const std::int64_t of_key = kv_heads * (args.k.size(3) + args.v.size(3)) * size_of(args.k.dtype);
  return std::clamp(bytes / of_key / kStep * kStep, kStep, most);
}

// Of one task: enough to be read at memory's speed, and fewer of short sequences, so that there are tasks for many threads.
std::int64_t keys_of_task(const AttendArgs& args, std::int64_t kv_heads, std::int64_t keys) {
  constexpr std::int64_t kLeastBytes = 512 << 10, kMostBytes = 1 << 20, kTasks = 32;
  const std::int64_t large = keys_in(kMostBytes, args, kv_heads, 2048);
  return keys > kTasks * large ? large : keys_in(kLeastBytes, args, kv_heads, 1024);
}

// Between keys and values: every change costs as much as reading some kilobytes, so that about 256 KiB of either are read at
// once, of 128 keys and more. The scores of a block, of `rows` rows, stay in the second cache.
std::int64_t keys_of_block(const AttendArgs& args, std::int64_t kv_heads, std::int64_t rows) {
  constexpr std::int64_t kBytes = 512 << 10, kScoreBytes = 128 << 10, kLeast = 128;
  const std::int64_t scored = kScoreBytes / static_cast<std::int64_t>(sizeof(float)) / rows;
  return std::max(kLeast, std::min(keys_in(kBytes, args, kv_heads, kDecodeBlock), scored / kLeast * kLeast));
}

}  // namespace

void attend_decode(const Path& path, const AttendArgs& args) {
  const Ops& ops = ops_for(path, args.q.dtype);
  const std::int64_t batch = args.q.size(0), rows = args.q.size(1), heads = args.q.size(2);
  const std::int64_t kv_step = heads_are_one_run(args.k) && heads_are_one_run(args.v) ? args.k.size(2) : 1;
  const std::int64_t kv_groups = args.k.size(2) / kv_step;
  const Interval hull = key_hull(args.tiles);
  const BandList list(args.tiles, rows, rows, hull.begin, false);
  const std::int64_t keys = keys_of_task(args, kv_step, hull.count()),
                     block = keys_of_block(args, kv_step, div_up(rows * heads, kv_groups));
  const std::int64_t splits = div_up(hull.count(), keys);
  const SplitStates states(args, splits, padded_to(args.v.size(3), ops.lanes));
  const std::int64_t scratch_bytes = ops.decode_scratch(args.q.size(3), args.v.size(3), rows * heads, kv_step);
  parallel_for(batch * splits * kv_groups, [&](std::int64_t task) {
    const std::int64_t kv = task % kv_groups * kv_step, split = task / kv_groups % splits, b = task / kv_groups / splits;
    const std::int64_t begin = split * keys, count = std::min(keys, hull.count() - begin);
    std::vector<Band> bands;
    list.in_range(0, begin, begin + count, bands);
    std::vector<Terms> terms;
    std::vector<DecodeHead> job_heads;
    terms.reserve(static_cast<std::size_t>(heads));
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t own = args.heads.kv_of(h) - kv;
      if (own < 0 || own >= kv_step) continue;
      terms.push_back(terms_of(args.terms, args.scale, args.heads, b, 0, h));
      job_heads.push_back(
          {rows_of(args.q, b, 0, rows, h), own, args.terms.any() ? &terms.back() : nullptr, states.at(b, h, split, 0)});
    }
    DecodeJob job{};
    job.k = rows_of(args.k, b, hull.begin + begin, count, kv);
    job.v = rows_of(args.v, b, hull.begin + begin, count, kv);
    job.k_head = args.k.stride(2);
    job.v_head = args.v.stride(2);
    job.kv_heads = kv_step;
    job.heads = job_heads.data();
    job.n_heads = static_cast<std::int64_t>(job_heads.size());
    job.rows = rows;
    job.block = block;
    job.bands = bands.data();
    job.n_bands = static_cast<std::int64_t>(bands.size());
    job.scale_log2 = base2_factor(args.scale, args.terms);
    job.negate = args.scale < 0;
    job.scratch = scratch(scratch_bytes);
    ops.decode(job);
  });
  states.finish(args);
}

}  // namespace dattn::cpu
