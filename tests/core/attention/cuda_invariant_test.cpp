// Invariant mode of the cuda kernel: the bits of a row do not depend on which other rows are in the call.
#include "tests/core/attention/on_cuda.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CudaInvariant : public OnCuda {};

// The call whose rows are checked.
struct Case {
  std::string name;
  Problem p;
  std::vector<Region> mask;
};

constexpr std::int64_t kSeq = 213;

Case make_case(const std::string& name, const Mask& mask) {
  Case c{name, make_problem(kSeq, kSeq, 2, 1, 24, 40, mask), compile(mask, kSeq, kSeq)};
  c.p.invariant = true;
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  all.push_back(make_case("causal", Mask::causal()));
  all.push_back(make_case("window of both sides", Mask::window(7, 101)));
  all.push_back(make_case("documents", Mask::documents({0, 1, 90, 141, 142, 213}, Mask::causal())));
  // Regions of which rows see several, the later ones in memory first; sinks, a window, stretches far away.
  all.push_back(make_case("regions", Mask::of_regions({{{100, 200}, {180, 210}, -kUnbounded, 60},
                                                       {{40, 200}, {0, 9}},
                                                       {{0, 213}, {9, 170}, -60, 0},
                                                       {{100, 150}, {9, 70}, -kUnbounded, -61}})));
  Case terms = make_case("causal with terms", Mask::causal());
  terms.p.softcap = 3;
  terms.p.slopes = {0.25, 0.125};
  terms.p.bias = {1, kSeq, 2, kSeq};
  terms.p.dropout = {0.2, 5, 6, 0, 2};
  all.push_back(terms);
  return all;
}

std::vector<Positions> shards() {
  return {Positions::range(1, kSeq),
          Positions::range(63, kSeq),
          Positions::range(0, 65),
          Positions::range(70, 200),
          Positions({{100, 80, 1}, {3, 50, 1}}),  // zigzag
          Positions({{1, 70, 3}}),
          Positions::range(130, 131)};
}

// The rows of a shard of `from` along axis 1, both on the cpu.
Tensor rows_of(const TensorView& from, const Positions& rows) {
  Shape shape = from.shape;
  shape[1] = rows.count();
  Tensor part(from.dtype, shape);
  for (std::int64_t i = 0; i < rows.count(); ++i) copy(from.slice(1, rows.at(i), 1), part->slice(1, i, 1));
  return part;
}

// A statistic [B, H, S] as [B, S, H].
Tensor by_row(const TensorView& statistic) { return to_dtype(statistic.transpose(1, 2), statistic.dtype); }

// A result on the device beside the same rows of the whole on the cpu.
bool equal_rows(const Tensor& part, const TensorView& whole, const Positions& rows) {
  return same_bits(to_device(part, {}), rows_of(whole, rows));
}

// Inputs in storage type on the cpu, and the results of the whole.
struct Whole {
  Tensor q, k, v, dout, bias, delta;
  Results results;
};

Whole run_whole(const Problem& p, DType storage) {
  const Inputs in = random_inputs(p, storage);
  Whole w{to_dtype(in.q, storage),
          to_dtype(in.k, storage),
          to_dtype(in.v, storage),
          to_dtype(in.dout, storage),
          in.bias.defined() ? to_dtype(in.bias, storage) : Tensor(),
          Tensor(),
          run_cuda(p, in, storage)};
  const DeviceScope scope(kCuda);
  const Tensor delta(DType::kF32, {p.batch, p.heads, p.seq_q});
  attention_delta(to_device(w.dout, kCuda), to_device(w.results.out, kCuda), delta);
  w.delta = to_device(delta, {});
  return w;
}

Tensor send(const Tensor& tensor) { return tensor.defined() ? to_device(tensor, kCuda) : Tensor(); }

// out, lse and dq of a part of the queries.
void expect_same_queries(const Case& c, const Whole& w, const Positions& rows, const std::string& what) {
  const Tensor q = send(rows_of(w.q, rows)), dout = send(rows_of(w.dout, rows)), k = send(w.k), v = send(w.v);
  const Tensor bias = w.bias.defined() ? send(rows_of(w.bias, rows)) : Tensor();
  const auto tiles = make_tiles(c.mask, rows, Positions::range(0, kSeq));
  const ScoreTerms terms = terms_of(c.p, bias);
  const DeviceScope scope(kCuda);
  const Tensor out(DType::kF32, dout->shape), lse(DType::kF32, {1, c.p.heads, rows.count()}), delta(DType::kF32, lse->shape);
  const Tensor dq(DType::kF32, q->shape), dbias = bias.defined() ? Tensor(DType::kF32, bias->shape) : Tensor();
  cuda_kernel().attend({q, k, v, c.p.map, tiles, c.p.factor(), out, lse, false, terms, true});
  attention_delta(dout, out, delta);
  cuda_kernel().attend_grad({q, k, v, c.p.map, tiles, c.p.factor(), dout, lse, delta, dq, {}, {}, terms, true, dbias});
  EXPECT_TRUE(equal_rows(out, w.results.out, rows)) << what << ": out";
  EXPECT_TRUE(same_bits(by_row(to_device(lse, {})), rows_of(by_row(w.results.lse), rows))) << what << ": lse";
  EXPECT_TRUE(equal_rows(dq, w.results.dq, rows)) << what << ": dq";
  if (bias.defined()) {
    EXPECT_TRUE(equal_rows(dbias, w.results.dbias, rows)) << what << ": dbias";
  }
}

// dk and dv of a part of the keys.
void expect_same_keys(const Case& c, const Whole& w, const Positions& rows, const std::string& what) {
  const Tensor q = send(w.q), k = send(rows_of(w.k, rows)), v = send(rows_of(w.v, rows)), dout = send(w.dout);
  const Tensor bias = send(w.bias), lse = send(w.results.lse), delta = send(w.delta);
  const auto tiles = make_tiles(c.mask, Positions::range(0, kSeq), rows);
  const DeviceScope scope(kCuda);
  const Tensor dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
  cuda_kernel().attend_grad({q, k, v, c.p.map, tiles, c.p.factor(), dout, lse, delta, {}, dk, dv, terms_of(c.p, bias), true});
  EXPECT_TRUE(equal_rows(dk, w.results.dk, rows)) << what << ": dk";
  EXPECT_TRUE(equal_rows(dv, w.results.dv, rows)) << what << ": dv";
}

TEST_F(CudaInvariant, RowsHaveTheSameBitsInEveryShard) {
  for (const Case& c : cases()) {
    for (const DType storage : {DType::kF32, DType::kBF16}) {
      const Whole w = run_whole(c.p, storage);
      for (const Positions& rows : shards()) {
        const std::string what = fmt::format("{} {} {}", c.name, name_of(storage), rows.text());
        expect_same_queries(c, w, rows, what);
        expect_same_keys(c, w, rows, what);
      }
    }
  }
}

TEST_F(CudaInvariant, IsStillAttention) {
  for (const Case& c : cases()) check_cuda(c.p, c.name);
}

// Heads of a group in calls of their own, added in ascending order.
TEST_F(CudaInvariant, HeadsOfAGroupAddUpOneByOne) {
  for (const DType storage : {DType::kF32, DType::kBF16}) {
    Case c = make_case("heads", Mask::causal());
    c.p.heads = 6;
    c.p.kv_heads = 2;
    c.p.map.group = 3;
    c.p.dropout = {0.1, 5, 6, 0, 6};
    const Whole w = run_whole(c.p, storage);
    const Tensor q = send(w.q), k = send(w.k), v = send(w.v), dout = send(w.dout), lse = send(w.results.lse);
    const Tensor delta = send(w.delta);
    const DeviceScope scope(kCuda);
    const Tensor dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
    for (std::int64_t h = 0; h < c.p.heads; ++h) {
      HeadMap map = c.p.map;
      map.q_begin = h;
      const Tensor dk_part(DType::kF32, k->shape), dv_part(DType::kF32, v->shape);
      cuda_kernel().attend_grad({q->slice(2, h, 1),
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
}

}  // namespace
}  // namespace dattn
