// The property that invariant mode has, for the tests of every kernel: a row gets the same bits whatever other rows are in the
// call, and heads of a group add up one by one.
#pragma once

#include <fmt/format.h>

#include "tests/core/attention/every_path.h"

namespace dattn::testing {

// The call whose rows are checked.
struct InvariantCase {
  std::string name;
  Problem p;
  std::vector<Region> mask;
};

inline InvariantCase invariant_case(const std::string& name, const Mask& mask, std::int64_t seq, std::int64_t heads,
                                    std::int64_t kv_heads, std::int64_t dim_qk, std::int64_t dim_v) {
  InvariantCase c{name, make_problem(seq, seq, heads, kv_heads, dim_qk, dim_v, mask), compile(mask, seq, seq)};
  c.p.invariant = true;
  return c;
}

// A kernel on its device. Inputs and what is expected lie on the cpu.
class InvariantRows {
 public:
  InvariantRows(const AttentionKernel& kernel, Device device) : kernel_(kernel), device_(device) {}

  // Inputs in storage type, and the results of the whole.
  struct Whole {
    Tensor q, k, v, dout, bias, delta;
    Results results;
  };

  Whole run_whole(const Problem& p, DType storage) const {
    const Inputs in = random_inputs(p, storage);
    Whole w{to_dtype(in.q, storage),
            to_dtype(in.k, storage),
            to_dtype(in.v, storage),
            to_dtype(in.dout, storage),
            in.bias.defined() ? to_dtype(in.bias, storage) : Tensor(),
            Tensor(),
            run_kernel(kernel_, p, in, storage, device_)};
    const DeviceScope scope(device_);
    const Tensor delta(DType::kF32, {p.batch, p.heads, p.seq_q});
    attention_delta(send(w.dout), send(w.results.out), delta);
    w.delta = to_device(delta, {});
    return w;
  }

  // The rows of every shard in calls of their own, by themselves as queries and as keys.
  void expect_same(const InvariantCase& c, DType storage, const std::vector<Positions>& shards) const {
    const Whole w = run_whole(c.p, storage);
    for (const Positions& rows : shards) {
      const std::string what = fmt::format("{} {} {}", c.name, name_of(storage), rows.text());
      expect_same_queries(c, w, rows, what);
      expect_same_keys(c, w, rows, what);
    }
  }

  // Heads of a group in calls of their own, added in ascending order: six heads in two groups, with dropout.
  void expect_heads_add_up(InvariantCase c, DType storage) const {
    c.p.heads = 6;
    c.p.kv_heads = 2;
    c.p.map.group = 3;
    c.p.dropout = {0.1, 5, 6, 0, 6};
    const Whole w = run_whole(c.p, storage);
    const Tensor q = send(w.q), k = send(w.k), v = send(w.v), dout = send(w.dout), lse = send(w.results.lse);
    const Tensor delta = send(w.delta);
    const DeviceScope scope(device_);
    const Tensor dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
    for (std::int64_t h = 0; h < c.p.heads; ++h) {
      HeadMap map = c.p.map;
      map.q_begin = h;
      const Tensor dk_part(DType::kF32, k->shape), dv_part(DType::kF32, v->shape);
      kernel_.attend_grad({q->slice(2, h, 1),
                           k,
                           v,
                           map,
                           c.p.tiles,
                           c.p.factor(),
                           dout->slice(2, h, 1),
                           lse->slice(1, h, 1),
                           delta->slice(1, h, 1),
                           {},
                           dk_part,
                           dv_part,
                           terms_of(c.p, w.bias),
                           true});
      add(dk_part, dk);
      add(dv_part, dv);
    }
    EXPECT_TRUE(same_bits(to_device(dk, {}), w.results.dk) && same_bits(to_device(dv, {}), w.results.dv)) << name_of(storage);
  }

 private:
  Tensor send(const Tensor& tensor) const { return tensor.defined() ? to_device(tensor, device_) : Tensor(); }

  // The rows of a shard of `from` along axis 1, both on the cpu.
  static Tensor rows_of(const TensorView& from, const Positions& rows) {
    Shape shape = from.shape;
    shape[1] = rows.count();
    Tensor part(from.dtype, shape);
    for (std::int64_t i = 0; i < rows.count(); ++i) copy(from.slice(1, rows.at(i), 1), part->slice(1, i, 1));
    return part;
  }

  // A statistic [B, H, S] as [B, S, H].
  static Tensor by_row(const TensorView& statistic) { return to_dtype(statistic.transpose(1, 2), statistic.dtype); }

  // A result on the device beside the same rows of the whole.
  static bool equal_rows(const Tensor& part, const TensorView& whole, const Positions& rows) {
    return same_bits(to_device(part, {}), rows_of(whole, rows));
  }

  // out, lse and dq of a part of the queries.
  void expect_same_queries(const InvariantCase& c, const Whole& w, const Positions& rows, const std::string& what) const {
    const Tensor q = send(rows_of(w.q, rows)), dout = send(rows_of(w.dout, rows)), k = send(w.k), v = send(w.v);
    const Tensor bias = w.bias.defined() ? send(rows_of(w.bias, rows)) : Tensor();
    const auto tiles = make_tiles(c.mask, rows, Positions::range(0, c.p.seq_kv));
    const ScoreTerms terms = terms_of(c.p, bias);
    const DeviceScope scope(device_);
    const Tensor out(DType::kF32, dout->shape), lse(DType::kF32, {1, c.p.heads, rows.count()}), delta(DType::kF32, lse->shape);
    const Tensor dq(DType::kF32, q->shape), dbias = bias.defined() ? Tensor(DType::kF32, bias->shape) : Tensor();
    kernel_.attend({q, k, v, c.p.map, tiles, c.p.factor(), out, lse, false, terms, true});
    attention_delta(dout, out, delta);
    kernel_.attend_grad({q, k, v, c.p.map, tiles, c.p.factor(), dout, lse, delta, dq, {}, {}, terms, true, dbias});
    EXPECT_TRUE(equal_rows(out, w.results.out, rows)) << what << ": out";
    EXPECT_TRUE(same_bits(by_row(to_device(lse, {})), rows_of(by_row(w.results.lse), rows))) << what << ": lse";
    EXPECT_TRUE(equal_rows(dq, w.results.dq, rows)) << what << ": dq";
    if (bias.defined()) {
      EXPECT_TRUE(equal_rows(dbias, w.results.dbias, rows)) << what << ": dbias";
    }
  }

  // dk and dv of a part of the keys.
  void expect_same_keys(const InvariantCase& c, const Whole& w, const Positions& rows, const std::string& what) const {
    const Tensor q = send(w.q), k = send(rows_of(w.k, rows)), v = send(rows_of(w.v, rows)), dout = send(w.dout);
    const Tensor bias = send(w.bias), lse = send(w.results.lse), delta = send(w.delta);
    const auto tiles = make_tiles(c.mask, Positions::range(0, c.p.seq_q), rows);
    const DeviceScope scope(device_);
    const Tensor dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
    kernel_.attend_grad({q, k, v, c.p.map, tiles, c.p.factor(), dout, lse, delta, {}, dk, dv, terms_of(c.p, bias), true});
    EXPECT_TRUE(equal_rows(dk, w.results.dk, rows)) << what << ": dk";
    EXPECT_TRUE(equal_rows(dv, w.results.dv, rows)) << what << ": dv";
  }

  const AttentionKernel& kernel_;
  Device device_;
};

}  // namespace dattn::testing
