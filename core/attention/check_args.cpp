#include "core/attention/check_args.h"

#include "core/base/error.h"

namespace dattn {
namespace {

void check_view(const char* name, const TensorView& view, const Shape& shape, DType type) {
  ensure(view.shape == shape, "attention: {} has shape {} where {} is needed", name, view.shape.text(), shape.text());
  ensure(view.dtype == type, "attention: {} has type {} where {} is needed", name, name_of(view.dtype), name_of(type));
  const int last = shape.axes - 1;
  ensure(view.elements() == 0 || view.data != nullptr, "attention: {} {} has no memory", name, shape.text());
  ensure(shape[last] <= 1 || view.stride(last) == 1, "attention: the last axis of {} has stride {}; it must be contiguous",
         name, view.stride(last));
}

void check_inputs(const TensorView& q, const TensorView& k, const TensorView& v, const HeadMap& heads) {
  ensure(q.axes() == 4 && k.axes() == 4 && v.axes() == 4, "attention: q, k, v are [B, S, H, D]; got {}, {}, {}", q.shape.text(),
         k.shape.text(), v.shape.text());
  check_view("q", q, q.shape, q.dtype);
  check_view("k", k, {q.size(0), k.size(1), k.size(2), q.size(3)}, q.dtype);
  check_view("v", v, {q.size(0), k.size(1), k.size(2), v.size(3)}, q.dtype);
  ensure(q.size(3) >= 1 && v.size(3) >= 1, "attention: dims {} and {} must be at least 1", q.size(3), v.size(3));
  ensure(heads.group >= 1, "attention: {} query heads share one KV head", heads.group);
  if (q.size(2) == 0) return;
  const std::int64_t first = heads.kv_of(0), last = heads.kv_of(q.size(2) - 1);
  ensure(first >= 0 && last < k.size(2), "attention: {} query heads read KV heads {} to {} of {}", q.size(2), first, last,
         k.size(2));
}

void check_tiles(std::span<const Tile> tiles, std::int64_t seq_q, std::int64_t seq_kv) {
  for (const Tile& tile : tiles) {
    const Region& rows = tile.rows;
    ensure(rows.q.begin >= 0 && rows.q.end <= seq_q && rows.k.begin >= 0 && rows.k.end <= seq_kv,
           "attention: tile {} lies outside {} query rows and {} key rows", to_text(rows), seq_q, seq_kv);
  }
}

}  // namespace

void check_args(const AttendArgs& args) {
  check_inputs(args.q, args.k, args.v, args.heads);
  const DType sum = accumulate_type(args.q.dtype);
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2);
  check_view("out", args.out, {batch, seq, heads, args.v.size(3)}, sum);
  ensure(args.lse.shape == Shape({batch, heads, seq}) && args.lse.dtype == sum, "attention: lse is {} {} where {} {} is needed",
         name_of(args.lse.dtype), args.lse.shape.text(), name_of(sum), Shape({batch, heads, seq}).text());
  check_tiles(args.tiles, seq, args.k.size(1));
}

void check_args(const AttendGradArgs& args) {
  check_inputs(args.q, args.k, args.v, args.heads);
  const DType sum = accumulate_type(args.q.dtype);
  const std::int64_t batch = args.q.size(0), seq = args.q.size(1), heads = args.q.size(2);
  check_view("dout", args.dout, {batch, seq, heads, args.v.size(3)}, args.q.dtype);
  for (const TensorView* row : {&args.lse, &args.delta}) {
    ensure(row->shape == Shape({batch, heads, seq}) && row->dtype == sum,
           "attention: lse or delta is {} {} where {} {} is needed", name_of(row->dtype), row->shape.text(), name_of(sum),
           Shape({batch, heads, seq}).text());
  }
  check_view("dq", args.dq, args.q.shape, sum);
  check_view("dk", args.dk, args.k.shape, sum);
  check_view("dv", args.dv, args.v.shape, sum);
  check_tiles(args.tiles, seq, args.k.size(1));
}

}  // namespace dattn
