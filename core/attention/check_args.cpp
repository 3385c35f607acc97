#include "core/attention/check_args.h"

#include <algorithm>
#include <cmath>

#include "core/attention/dropout.h"
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

// The end of the positions that the tiles hold.
struct PositionEnds {
  std::int64_t q = 0, k = 0;
};
PositionEnds position_ends(std::span<const Tile> tiles) {
  PositionEnds ends;
  for (const Tile& tile : tiles) {
    ensure(tile.q_position >= 0 && tile.k_position >= 0 && tile.q_step >= 1 && tile.k_step >= 1,
           "attention: tile {} is at positions {} and {}, steps {} and {}", to_text(tile.rows), tile.q_position,
           tile.k_position, tile.q_step, tile.k_step);
    ends.q = std::max(ends.q, tile.q_at(tile.rows.q.end - 1) + 1);
    ends.k = std::max(ends.k, tile.k_at(tile.rows.k.end - 1) + 1);
  }
  return ends;
}

void check_bias(const TensorView& bias, const TensorView& q, std::int64_t end_k) {
  ensure(bias.axes() == 4, "attention: the bias is [B or 1, S, H or 1, N]; got {}", bias.shape.text());
  const std::int64_t batch = bias.size(0) == 1 ? 1 : q.size(0), heads = bias.size(2) == 1 ? 1 : q.size(2);
  check_view("bias", bias, {batch, q.size(1), heads, bias.size(3)}, bias.dtype);
  ensure(bias.dtype == q.dtype || bias.dtype == DType::kF32, "attention: the bias has type {} beside q of type {}",
         name_of(bias.dtype), name_of(q.dtype));
  ensure(bias.size(3) >= end_k, "attention: the bias has {} columns, keys have positions up to {}", bias.size(3), end_k - 1);
}

void check_dropout(const AttentionDropout& dropout, const TensorView& q, const HeadMap& heads, const PositionEnds& ends) {
  ensure(dropout.p >= 0 && dropout.p < 1, "attention: dropout p is {}; it is in [0, 1)", dropout.p);
  if (dropout.p == 0) return;
  ensure(ends.q <= kDropoutPositions && ends.k <= kDropoutPositions,
         "attention: positions up to {} under dropout, which has room for {}", std::max(ends.q, ends.k) - 1, kDropoutPositions);
  ensure(dropout.stream >> 32 == 0, "attention: dropout stream {} has more than 32 bits", dropout.stream);
  ensure(dropout.batch_begin >= 0 && heads.q_begin + q.size(2) <= dropout.heads,
         "attention: heads up to {} of {} under dropout", heads.q_begin + q.size(2) - 1, dropout.heads);
  ensure((dropout.batch_begin + q.size(0)) * dropout.heads <= std::int64_t{1} << 32,
         "attention: {} batch rows of {} heads under dropout have more than 32 bits", dropout.batch_begin + q.size(0),
         dropout.heads);
}

void check_terms(const ScoreTerms& terms, const TensorView& q, const HeadMap& heads, std::span<const Tile> tiles) {
  if (!terms.any()) return;
  const PositionEnds ends = position_ends(tiles);
  ensure(terms.softcap >= 0 && std::isfinite(terms.softcap), "attention: softcap is {}", terms.softcap);
  const auto slopes = static_cast<std::int64_t>(terms.alibi_slopes.size());
  ensure(slopes == 0 || heads.q_begin + q.size(2) <= slopes, "attention: {} alibi slopes for heads up to {}", slopes,
         heads.q_begin + q.size(2) - 1);
  if (terms.bias.data != nullptr) check_bias(terms.bias, q, ends.k);
  check_dropout(terms.dropout, q, heads, ends);
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
  check_terms(args.terms, args.q, args.heads, args.tiles);
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
  if (args.dq.data != nullptr) check_view("dq", args.dq, args.q.shape, sum);
  ensure((args.dk.data == nullptr) == (args.dv.data == nullptr) || args.k.elements() == 0,
         "attention: dk and dv are wanted together or not at all");
  if (args.dk.data != nullptr) check_view("dk", args.dk, args.k.shape, sum);
  if (args.dv.data != nullptr) check_view("dv", args.dv, args.v.shape, sum);
  if (args.dbias.data != nullptr) check_view("dbias", args.dbias, args.terms.bias.shape, sum);
  check_tiles(args.tiles, seq, args.k.size(1));
  check_terms(args.terms, args.q, args.heads, args.tiles);
}

}  // namespace dattn
