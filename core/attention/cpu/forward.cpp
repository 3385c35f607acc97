// Forward driver. Keys and values are packed once per KV head; then one task is one block of query rows of one head,
// which owns its rows of (out, lse). Blocks are handed out last first: under a causal mask those see most keys.
#include "core/attention/cpu/band_list.h"
#include "core/attention/cpu/drive.h"
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

}  // namespace

void attend(const Path& path, const AttendArgs& args) {
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2);
  if (batch * seq * heads == 0) return;
  if (seq <= kDecodeRows && !args.invariant) return attend_decode(path, args);
  const Ops& ops = ops_for(path, args.q.dtype);
  const Interval hull = key_hull(args.tiles, args.invariant ? kForwardKeys : 1);
  const BandList list(args.tiles, seq, kForwardRows, hull.begin, args.invariant);
  const PackedKeys packed(ops, args, hull);
  const std::int64_t n_blocks = list.blocks();
  const std::int64_t scratch_bytes = ops.forward_scratch(args.q.size(3), args.v.size(3));
  parallel_for(batch * heads * n_blocks, [&](std::int64_t task) {
    const std::int64_t block = n_blocks - 1 - task % n_blocks, h = task / n_blocks % heads, b = task / n_blocks / heads;
    const auto& bands = list.block(block);
    if (bands.empty() && args.merge) return;
    const std::int64_t row = block * kForwardRows, kv = b * args.k.size(2) + args.heads.kv_of(h);
    ForwardJob job{};
    job.q = rows_of(args.q, b, row, std::min(kForwardRows, seq - row), h);
    job.k_columns = packed.columns(kv);
    job.v_rows = packed.rows(kv);
    job.v_units = packed.units();
    job.dim_v = args.v.size(3);
    job.bands = bands.data();
    job.n_bands = static_cast<std::int64_t>(bands.size());
    job.scale_log2 = base2_factor(args.scale, args.terms);
    job.out = &args.out.at<float>(b, row, h);
    job.out_stride = args.out.stride(1);
    job.lse = &args.lse.at<float>(b, h, row);
    job.lse_stride = args.lse.stride(2);
    job.merge = args.merge;
    job.invariant = args.invariant;
    const Terms terms = terms_of(args.terms, args.scale, args.heads, b, row, h);
    job.terms = args.terms.any() ? &terms : nullptr;
    job.scratch = scratch(scratch_bytes);
    ops.forward(job);
  });
}

}  // namespace dattn::cpu
