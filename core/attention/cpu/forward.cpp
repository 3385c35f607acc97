// Forward driver. Keys and values are packed once per KV head; then one task is one block of query rows of one head, which owns
// its rows of (out, lse). Of each head the blocks that see most pairs are handed out first, so that no thread is left with a
// long one at the end. Where there are few blocks, a task is one of them against a part of the keys.
#include <algorithm>
#include <optional>
#include <utility>

#include "core/attention/cpu/band_list.h"
#include "core/attention/cpu/drive.h"
#include "core/attention/cpu/split_states.h"
#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

// Packed keys and values of all KV heads, in pieces that one task packs.
class PackedKeys {
 public:
  PackedKeys(const Ops& ops, const AttendArgs& args, Interval keys)
      : ops_(ops), args_(args), keys_(keys), padded_keys_(padded_to(keys.count(), ops.panel)) {
    const std::int64_t per_unit = ops.units_per_word, heads = args.k.size(0) * args.k.size(2);
    column_units_ = div_up(args.k.size(3), per_unit) * padded_keys_;
    row_units_ = padded_keys_ / per_unit * padded_to(args.v.size(3), ops.lanes);
    units_ = Tensor::uninitialized(DType::kF32, {heads * (column_units_ + row_units_)});
    const std::int64_t pieces = div_up(padded_keys_, kForwardKeys);
    parallel_for(heads * pieces, [&](std::int64_t task) { pack(task / pieces, task % pieces); });
  }

  const float* columns(std::int64_t head) const { return units_.ptr<float>() + head * (column_units_ + row_units_); }
  const float* rows(std::int64_t head) const { return columns(head) + column_units_; }
  std::int64_t units() const { return padded_keys_ / ops_.units_per_word; }  // of the rows

 private:
  void pack(std::int64_t head, std::int64_t piece) {
    const std::int64_t b = head / args_.k.size(2), kv = head % args_.k.size(2), begin = piece * kForwardKeys;
    const std::int64_t count = std::min(kForwardKeys, keys_.count() - begin);
    float* base = units_.ptr<float>() + head * (column_units_ + row_units_);
    ops_.pack_columns(rows_of(args_.k, b, keys_.begin + begin, count, kv), args_.scale < 0,
                      base + column_units_ / padded_keys_ * begin);
    ops_.pack_rows(rows_of(args_.v, b, keys_.begin + begin, count, kv), padded_to(count, ops_.panel),
                   begin / ops_.units_per_word, units(), base + column_units_);
  }

  const Ops& ops_;
  const AttendArgs& args_;
  Interval keys_;
  std::int64_t padded_keys_, column_units_ = 0, row_units_ = 0;
  Tensor units_;
};

// In how many parts the keys are cut. One, but where there are few blocks of rows to share out over threads: by the shape
// alone, and, for the same bits whatever rows are in the call, never for invariant calls, which then have no more tasks than
// blocks.
std::int64_t parts_of_keys(const AttendArgs& args, std::int64_t keys) {
  constexpr std::int64_t kFewBlocks = 8, kTasks = 64;    // those of one processor, and of one with many cores
  constexpr std::int64_t kLeastKeys = 4 * kForwardKeys;  // merging the states of fewer takes over 2 % of a pass
  const std::int64_t blocks = args.q.size(0) * args.q.size(2) * div_up(args.q.size(1), kForwardRows);
  if (args.invariant || blocks >= kFewBlocks) return 1;
  return std::clamp<std::int64_t>(keys / kLeastKeys, 1, div_up(kTasks, blocks));
}

// What one call needs everywhere.
struct Call {
  const Ops& ops;
  const AttendArgs& args;
  std::vector<BandList> parts;  // of the keys, which are counted from the first that any row sees
  PackedKeys packed;
  std::optional<SplitStates> states;  // where there are several parts
  std::int64_t scratch_bytes;
};

Call call_of(const Ops& ops, const AttendArgs& args) {
  const Interval hull = key_hull(args.tiles, args.invariant ? kForwardKeys : 1);
  const std::int64_t step = padded_to(div_up(hull.count(), parts_of_keys(args, hull.count())), kForwardKeys);
  std::vector<BandList> parts;
  for (std::int64_t key = hull.begin; key < hull.end || parts.empty(); key += step)
    parts.emplace_back(args.tiles, args.q.size(1), kForwardRows, hull.begin, args.invariant, Interval{key, key + step});
  std::optional<SplitStates> states;
  if (parts.size() > 1) states.emplace(args, static_cast<std::int64_t>(parts.size()), padded_to(args.v.size(3), ops.lanes));
  return {ops,
          args,
          std::move(parts),
          PackedKeys(ops, args, hull),
          std::move(states),
          ops.forward_scratch(args.q.size(3), args.v.size(3))};
}

// One block of query rows of one head against one part of the keys.
void run_task(const Call& call, std::int64_t b, std::int64_t h, const ListedBlock& task) {
  const AttendArgs& args = call.args;
  const auto& bands = call.parts[static_cast<std::size_t>(task.list)].block(task.block);
  if (bands.empty() && args.merge && !call.states) return;
  const std::int64_t row = task.block * kForwardRows, kv = b * args.k.size(2) + args.heads.kv_of(h);
  ForwardJob job{};
  job.q = rows_of(args.q, b, row, std::min(kForwardRows, args.q.size(1) - row), h);
  job.k_columns = call.packed.columns(kv);
  job.v_rows = call.packed.rows(kv);
  job.v_units = call.packed.units();
  job.dim_v = args.v.size(3);
  job.bands = bands.data();
  job.n_bands = static_cast<std::int64_t>(bands.size());
  job.scale_log2 = base2_factor(args.scale, args.terms);
  if (call.states) {
    job.state = call.states->at(b, h, task.list, row);
  } else {
    job.out = &args.out.at<float>(b, row, h);
    job.out_stride = args.out.stride(1);
    job.lse = &args.lse.at<float>(b, h, row);
    job.lse_stride = args.lse.stride(2);
    job.merge = args.merge;
  }
  job.invariant = args.invariant;
  const Terms terms = terms_of(args.terms, args.scale, args.heads, b, row, h);
  job.terms = args.terms.any() ? &terms : nullptr;
  job.scratch = scratch(call.scratch_bytes);
  call.ops.forward(job);
}

}  // namespace

void attend(const Path& path, const AttendArgs& args) {
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2);
  if (batch * seq * heads == 0) return;
  if (seq <= kDecodeRows && !args.invariant) return attend_decode(path, args);
  const Call call = call_of(ops_for(path, args.q.dtype), args);
  const std::vector<ListedBlock> tasks = heaviest_first(call.parts);
  const auto n_tasks = static_cast<std::int64_t>(tasks.size());
  parallel_for(batch * heads * n_tasks, [&](std::int64_t task) {
    run_task(call, task / n_tasks / heads, task / n_tasks % heads, tasks[static_cast<std::size_t>(task % n_tasks)]);
  });
  if (call.states) call.states->finish(args);
}

}  // namespace dattn::cpu
