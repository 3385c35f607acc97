// Backward driver. One task is one chunk of keys of one KV head: it packs the chunk, goes through all query blocks of
// all query heads of the group, and owns the chunk's dk and dv. Several chunks add to the same rows of dq; they take
// turns in ascending order of chunks, so that sums do not depend on the threads. Tasks start in ascending order and wait
// only for lower ones, hence no deadlock; no buffer grows with chunks x rows, hence memory O(S).
#include <atomic>
#include <memory>
#include <thread>

#include "core/attention/cpu/drive.h"
#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

// What one call needs everywhere.
struct Call {
  const Ops& ops;
  const AttendGradArgs& args;
  Interval hull;                                       // key rows that any tile sees
  std::vector<std::vector<Band>> blocks;               // keys counted from hull.begin
  std::vector<Interval> chunks_of_block;               // chunks that a block may touch; those take turns
  std::unique_ptr<std::atomic<std::int64_t>[]> turns;  // [B, H, blocks]: the chunk whose turn it is
  std::int64_t q_width, v_width;                       // D and V, padded
};

// Memory of one task, in order of use.
struct TaskMemory {
  float *k_columns, *v_columns, *k_rows, *dk, *dv, *dq;
  std::byte* kernel;
};

std::int64_t lay_out(const Call& call, std::byte* base, TaskMemory& memory) {
  std::int64_t offset = 0;
  const auto take = [&](std::int64_t floats) {
    auto* at = reinterpret_cast<float*>(base + offset);
    offset += padded_to(floats * 4, 64);
    return at;
  };
  const std::int64_t q_units = ceil_div(call.args.q.size(3), call.ops.units_per_word);
  const std::int64_t v_units = ceil_div(call.args.v.size(3), call.ops.units_per_word);
  memory.k_columns = take(q_units * kBackwardKeys);
  memory.v_columns = take(v_units * kBackwardKeys);
  memory.k_rows = take(kBackwardKeys / call.ops.units_per_word * call.q_width);
  memory.dk = take(kBackwardKeys * call.q_width);
  memory.dv = take(kBackwardKeys * call.v_width);
  memory.dq = take(kBackwardRows * call.q_width);
  memory.kernel = base + offset;
  return offset + call.ops.backward_scratch(call.args.q.size(3), call.args.v.size(3));
}

// One query block of one head against the task's chunk of keys.
void run_piece(const Call& call, const TaskMemory& memory, std::int64_t b, std::int64_t h, std::int64_t block,
               const std::vector<Band>& bands) {
  const AttendGradArgs& args = call.args;
  const std::int64_t row = block * kBackwardRows, count = std::min(kBackwardRows, args.q.size(1) - row);
  BackwardJob job{};
  job.q = rows_of(args.q, b, row, count, h);
  job.dout = rows_of(args.dout, b, row, count, h);
  job.lse = &args.lse.at<float>(b, h, row);
  job.delta = &args.delta.at<float>(b, h, row);
  job.lse_stride = args.lse.stride(2);
  job.delta_stride = args.delta.stride(2);
  job.k_columns = memory.k_columns;
  job.v_columns = memory.v_columns;
  job.k_rows = memory.k_rows;
  job.bands = bands.data();
  job.n_bands = static_cast<std::int64_t>(bands.size());
  job.scale_log2 = base2_factor(args.scale);
  job.dk = memory.dk;
  job.dv = memory.dv;
  job.dq = memory.dq;
  job.scratch = memory.kernel;
  call.ops.backward(job);
}

// Waits until it is this chunk's turn at a block of dq. Yields: other ranks may share the cores.
void wait_for_turn(const std::atomic<std::int64_t>& turn, std::int64_t chunk) {
  for (int spins = 0; turn.load(std::memory_order_acquire) != chunk; ++spins) {
    if (spins > 64) std::this_thread::yield();
  }
}

void run_head(const Call& call, const TaskMemory& memory, std::int64_t b, std::int64_t h, std::int64_t chunk) {
  const AttendGradArgs& args = call.args;
  const std::int64_t begin = chunk * kBackwardKeys, end = std::min(begin + kBackwardKeys, call.hull.count());
  std::vector<Band> bands;
  for (std::size_t block = 0; block < call.blocks.size(); ++block) {
    const Interval chunks = call.chunks_of_block[block];
    if (chunk < chunks.begin || chunk >= chunks.end) continue;
    bands_in_range(call.blocks[block], begin, end, bands);
    const auto index = static_cast<std::int64_t>(block);
    if (!bands.empty()) run_piece(call, memory, b, h, index, bands);
    auto& turn =
        call.turns[static_cast<std::size_t>((b * args.q.size(2) + h) * static_cast<std::int64_t>(call.blocks.size()) + index)];
    wait_for_turn(turn, chunk);
    const std::int64_t row = index * kBackwardRows;
    if (!bands.empty()) {
      call.ops.add_rows(memory.dq, call.q_width, static_cast<float>(args.scale), &args.dq.at<float>(b, row, h),
                        args.dq.stride(1), std::min(kBackwardRows, args.q.size(1) - row), args.q.size(3));
    }
    turn.store(chunk + 1, std::memory_order_release);
  }
}

void run_chunk(const Call& call, std::int64_t b, std::int64_t kv, std::int64_t chunk) {
  const AttendGradArgs& args = call.args;
  TaskMemory memory{};
  const std::int64_t bytes = lay_out(call, nullptr, memory);
  lay_out(call, scratch(bytes), memory);
  const std::int64_t key = call.hull.begin + chunk * kBackwardKeys;
  const std::int64_t count = std::min(kBackwardKeys, call.hull.end - key);
  const Rows k = rows_of(args.k, b, key, count, kv), v = rows_of(args.v, b, key, count, kv);
  call.ops.pack_columns(k, args.scale < 0, memory.k_columns);
  call.ops.pack_columns(v, false, memory.v_columns);
  call.ops.pack_rows(k, kBackwardKeys, memory.k_rows);
  std::fill_n(memory.dk, kBackwardKeys * call.q_width, 0.0f);
  std::fill_n(memory.dv, kBackwardKeys * call.v_width, 0.0f);
  for (std::int64_t h = 0; h < args.q.size(2); ++h) {
    if (args.heads.kv_of(h) == kv) run_head(call, memory, b, h, chunk);
  }
  call.ops.add_rows(memory.dk, call.q_width, static_cast<float>(args.scale), &args.dk.at<float>(b, key, kv), args.dk.stride(1),
                    count, args.k.size(3));
  call.ops.add_rows(memory.dv, call.v_width, 1.0f, &args.dv.at<float>(b, key, kv), args.dv.stride(1), count, args.v.size(3));
}

Interval chunks_of(const std::vector<Band>& block) {
  if (block.empty()) return {0, 0};
  Interval keys{block.front().k_begin, block.front().k_end};
  for (const Band& band : block) keys = {std::min(keys.begin, band.k_begin), std::max(keys.end, band.k_end)};
  return {keys.begin / kBackwardKeys, ceil_div(keys.end, kBackwardKeys)};
}

}  // namespace

void attend_grad(const Path& path, const AttendGradArgs& args) {
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2), kv_heads = args.k.size(2);
  if (batch * seq * heads * kv_heads == 0 || args.tiles.empty()) return;
  const Ops& ops = ops_for(path, args.q.dtype);
  const Interval hull = key_hull(args.tiles);
  Call call{ops,
            args,
            hull,
            bands_by_block(args.tiles, seq, kBackwardRows, hull.begin),
            {},
            {},
            padded_to(args.q.size(3), ops.lanes),
            padded_to(args.v.size(3), ops.lanes)};
  for (const auto& block : call.blocks) call.chunks_of_block.push_back(chunks_of(block));
  const std::size_t n_blocks = call.blocks.size(), n_turns = n_blocks * static_cast<std::size_t>(batch * heads);
  call.turns = std::make_unique<std::atomic<std::int64_t>[]>(n_turns);
  for (std::size_t i = 0; i < n_turns; ++i) call.turns[i] = call.chunks_of_block[i % n_blocks].begin;
  const std::int64_t groups = batch * kv_heads, tasks = groups * ceil_div(hull.count(), kBackwardKeys);
  std::atomic<std::int64_t> next{0};  // tasks start in this order whatever the schedule of the loop
  parallel_for(tasks, [&](std::int64_t) {
    const std::int64_t task = next.fetch_add(1), group = task % groups;
    run_chunk(call, group / kv_heads, group % kv_heads, task / groups);
  });
}

}  // namespace dattn::cpu
