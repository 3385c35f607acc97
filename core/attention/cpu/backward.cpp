// Backward driver. One task is one chunk of keys of one KV head: it packs the chunk, goes through all query blocks of
// all query heads of the group, and owns the chunk's dk and dv. Several chunks add to the same rows of dq; they take
// turns in ascending order of chunks, so that sums do not depend on the threads. Tasks start in ascending order and wait
// only for lower ones, hence no deadlock; no buffer grows with chunks x rows, hence memory O(S). The gradient of a bias
// that several heads or batch rows share has turns too, in ascending order of batch rows and heads.
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "core/attention/cpu/band_list.h"
#include "core/attention/cpu/drive.h"
#include "core/base/threads.h"

namespace dattn::cpu {
namespace {

// Turns at pieces of memory that several tasks add to: entry i tells whose turn it is at piece i.
class Turns {
 public:
  template <class First>
  Turns(std::size_t pieces, const First& first) : now_(std::make_unique<std::atomic<std::int64_t>[]>(pieces)) {
    for (std::size_t i = 0; i < pieces; ++i) now_[i] = first(i);
  }
  // Yields: other ranks may share the cores.
  void wait(std::int64_t piece, std::int64_t turn) const {
    const auto& now = now_[static_cast<std::size_t>(piece)];
    for (int spins = 0; now.load(std::memory_order_acquire) != turn; ++spins) {
      if (spins > 64) std::this_thread::yield();
    }
  }
  void pass(std::int64_t piece, std::int64_t turn) {
    now_[static_cast<std::size_t>(piece)].store(turn + 1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<std::int64_t>[]> now_;
};

// What one call needs everywhere.
struct Call {
  const Ops& ops;
  const AttendGradArgs& args;
  Interval hull;                          // key rows that any tile sees
  std::int64_t keys;                      // of a chunk
  BandList bands;                         // keys counted from hull.begin
  std::vector<Interval> chunks_of_block;  // chunks that a block may touch; those take turns
  std::int64_t q_width, v_width;          // D and V, padded
  Turns rows;                             // [B, H, blocks]: the chunk whose turn it is to add to dq
  Turns dbias;  // [chunks, B or 1, H or 1, blocks]: whose turn it is among those that share; 0 pieces where none do
};

// Who shares a piece of dbias: the turn of (b, h), and which of the tensor's (batch row, head) it is.
struct Share {
  std::int64_t turn, piece;
};
bool shares_dbias(const AttendGradArgs& args) {
  const TensorView& dbias = args.dbias;
  return dbias.data != nullptr && (dbias.size(0) < args.q.size(0) || dbias.size(2) < args.q.size(2));
}
Share share_of(const AttendGradArgs& args, std::int64_t b, std::int64_t h) {
  const bool all_rows = args.dbias.size(0) == 1, all_heads = args.dbias.size(2) == 1;
  const std::int64_t heads = args.q.size(2);
  return {(all_rows ? b * (all_heads ? heads : 1) : 0) + (all_heads ? h : 0),
          (all_rows ? 0 : b) * args.dbias.size(2) + (all_heads ? 0 : h)};
}

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
  const std::int64_t q_units = div_up(call.args.q.size(3), call.ops.units_per_word);
  const std::int64_t v_units = div_up(call.args.v.size(3), call.ops.units_per_word);
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
  job.scale_log2 = base2_factor(args.scale, args.terms);
  Terms terms = terms_of(args.terms, args.scale, args.heads, b, row, h);
  if (args.dbias.data != nullptr) {
    terms.dbias = reinterpret_cast<float*>(bias_row(args.dbias, b, row, h));
    terms.dbias_stride = args.dbias.stride(1);
  }
  job.terms = args.terms.any() ? &terms : nullptr;
  job.dk = args.dk.data != nullptr ? memory.dk : nullptr;
  job.dv = args.dk.data != nullptr ? memory.dv : nullptr;
  job.dq = args.dq.data != nullptr ? memory.dq : nullptr;
  job.scratch = memory.kernel;
  call.ops.backward(job);
}

// The piece, when it is its turn at dbias.
void run_piece_in_turn(Call& call, const TaskMemory& memory, std::int64_t b, std::int64_t h, std::int64_t chunk,
                       std::int64_t block, const std::vector<Band>& bands) {
  if (!shares_dbias(call.args)) {
    if (!bands.empty()) run_piece(call, memory, b, h, block, bands);
    return;
  }
  const Share share = share_of(call.args, b, h);
  const std::int64_t shares = call.args.dbias.size(0) * call.args.dbias.size(2);
  const std::int64_t piece = (chunk * shares + share.piece) * call.bands.blocks() + block;
  call.dbias.wait(piece, share.turn);
  if (!bands.empty()) run_piece(call, memory, b, h, block, bands);
  call.dbias.pass(piece, share.turn);
}

void run_head(Call& call, const TaskMemory& memory, std::int64_t b, std::int64_t h, std::int64_t chunk) {
  const AttendGradArgs& args = call.args;
  const std::int64_t begin = chunk * call.keys, end = std::min(begin + call.keys, call.hull.count());
  std::vector<Band> bands;
  for (std::int64_t block = 0; block < call.bands.blocks(); ++block) {
    const Interval chunks = call.chunks_of_block[static_cast<std::size_t>(block)];
    if (chunk < chunks.begin || chunk >= chunks.end) continue;
    call.bands.in_range(block, begin, end, bands);
    run_piece_in_turn(call, memory, b, h, chunk, block, bands);
    if (args.dq.data == nullptr) continue;
    const std::int64_t piece = (b * args.q.size(2) + h) * call.bands.blocks() + block, row = block * kBackwardRows;
    call.rows.wait(piece, chunk);
    if (!bands.empty()) {
      call.ops.add_rows(memory.dq, call.q_width, static_cast<float>(args.scale), &args.dq.at<float>(b, row, h),
                        args.dq.stride(1), std::min(kBackwardRows, args.q.size(1) - row), args.q.size(3));
    }
    call.rows.pass(piece, chunk);
  }
}

void clear_key_sums(const Call& call, const TaskMemory& memory) {
  std::fill_n(memory.dk, kBackwardKeys * call.q_width, 0.0f);
  std::fill_n(memory.dv, kBackwardKeys * call.v_width, 0.0f);
}

// Adds the chunk's sums to `count` rows of dk and dv. `apart`: they are rounded with their factors first, so that adding
// heads one by one is the same in one call and in several.
void add_key_sums(const Call& call, const TaskMemory& memory, std::int64_t b, std::int64_t kv, std::int64_t key,
                  std::int64_t count, bool apart) {
  const AttendGradArgs& args = call.args;
  const auto add = [&](float* sums, std::int64_t width, double factor, const TensorView& to) {
    auto rest = static_cast<float>(factor);
    if (apart) {
      for (std::int64_t i = 0; i < kBackwardKeys * width; ++i) sums[i] *= rest;
      rest = 1;
    }
    call.ops.add_rows(sums, width, rest, &to.at<float>(b, key, kv), to.stride(1), count, to.size(3));
  };
  add(memory.dk, call.q_width, args.scale, args.dk);
  add(memory.dv, call.v_width, 1 / (1 - args.terms.dropout.p), args.dv);
}

void run_chunk(Call& call, std::int64_t b, std::int64_t kv, std::int64_t chunk) {
  const AttendGradArgs& args = call.args;
  TaskMemory memory{};
  const std::int64_t bytes = lay_out(call, nullptr, memory);
  lay_out(call, scratch(bytes), memory);
  const std::int64_t key = call.hull.begin + chunk * call.keys;
  const std::int64_t count = std::min(call.keys, call.hull.end - key);
  const Rows k = rows_of(args.k, b, key, count, kv), v = rows_of(args.v, b, key, count, kv);
  call.ops.pack_columns(k, args.scale < 0, memory.k_columns);
  call.ops.pack_columns(v, false, memory.v_columns);
  call.ops.pack_rows(k, kBackwardKeys, 0, kBackwardKeys / call.ops.units_per_word, memory.k_rows);
  clear_key_sums(call, memory);
  const bool wanted = args.dk.data != nullptr, apart = wanted && args.invariant;
  for (std::int64_t h = 0; h < args.q.size(2); ++h) {
    if (args.heads.kv_of(h) != kv) continue;
    run_head(call, memory, b, h, chunk);
    if (!apart) continue;
    add_key_sums(call, memory, b, kv, key, count, true);
    clear_key_sums(call, memory);
  }
  if (wanted && !apart) add_key_sums(call, memory, b, kv, key, count, false);
}

// Half of the most where that leaves few chunks to share out over threads, or where theirs would be more than the second-level
// cache holds. By the shape alone, and, for the same bits everywhere, by nothing.
std::int64_t keys_of_chunk(const AttendGradArgs& args, std::int64_t keys) {
  constexpr std::int64_t kFewChunks = 16, kWideHead = 128;
  if (args.invariant) return kBackwardKeys;
  const std::int64_t chunks = args.q.size(0) * args.k.size(2) * div_up(keys, kBackwardKeys);
  return chunks < kFewChunks || std::max(args.q.size(3), args.v.size(3)) > kWideHead ? kBackwardKeys / 2 : kBackwardKeys;
}

Interval chunks_of(const std::vector<Band>& block, std::int64_t chunk) {
  if (block.empty()) return {0, 0};
  Interval keys{block.front().k_begin, block.front().k_end};
  for (const Band& band : block) keys = {std::min(keys.begin, band.k_begin), std::max(keys.end, band.k_end)};
  return {keys.begin / chunk, div_up(keys.end, chunk)};
}

}  // namespace

void attend_grad(const Path& path, const AttendGradArgs& args) {
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2), kv_heads = args.k.size(2);
  if (batch * seq * heads * kv_heads == 0 || args.tiles.empty()) return;
  const Ops& ops = ops_for(path, args.q.dtype);
  const Interval hull = key_hull(args.tiles, args.invariant ? kBackwardKeys : 1);
  BandList bands(args.tiles, seq, kBackwardRows, hull.begin, args.invariant);
  std::vector<Interval> chunks_of_block;
  const auto n_blocks = static_cast<std::size_t>(bands.blocks()), n_turns = n_blocks * static_cast<std::size_t>(batch * heads);
  chunks_of_block.reserve(n_blocks);
  const std::int64_t keys = keys_of_chunk(args, hull.count());
  for (std::size_t i = 0; i < n_blocks; ++i)
    chunks_of_block.push_back(chunks_of(bands.block(static_cast<std::int64_t>(i)), keys));
  const std::int64_t n_chunks = div_up(hull.count(), keys), groups = batch * kv_heads;
  const std::int64_t shared = shares_dbias(args) ? n_chunks * args.dbias.size(0) * args.dbias.size(2) : 0;
  const auto first_chunk = [&](std::size_t i) { return chunks_of_block[i % n_blocks].begin; };
  Turns rows(n_turns, first_chunk), dbias(static_cast<std::size_t>(shared) * n_blocks, [](std::size_t) { return 0; });
  Call call{ops,
            args,
            hull,
            keys,
            std::move(bands),
            chunks_of_block,
            padded_to(args.q.size(3), ops.lanes),
            padded_to(args.v.size(3), ops.lanes),
            std::move(rows),
            std::move(dbias)};
  std::atomic<std::int64_t> next{0};  // tasks start in this order whatever the schedule of the loop
  parallel_for(groups * n_chunks, [&](std::int64_t) {
    const std::int64_t task = next.fetch_add(1), group = task % groups;
    run_chunk(call, group / kv_heads, group % kv_heads, task / groups);
  });
}

}  // namespace dattn::cpu
