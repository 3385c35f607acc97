// Invariant mode: the bits of a row do not depend on which other rows are in the call, on every instruction set here.
#include "tests/core/attention/every_path.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CpuInvariant : public EveryPath {};

// The call whose rows are checked, and the shards that rows are cut into.
struct Case {
  std::string name;
  Problem p;
  std::vector<Region> mask;
};

constexpr std::int64_t kSeq = 613;  // three forward key blocks, four backward ones

Case make_case(const std::string& name, const Mask& mask) {
  Case c{name, make_problem(kSeq, kSeq, 4, 2, 20, 36, mask), compile(mask, kSeq, kSeq)};
  c.p.invariant = true;
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  all.push_back(make_case("full", Mask::full()));
  all.push_back(make_case("causal", Mask::causal()));
  all.push_back(make_case("window", Mask::window(130, 0)));
  all.push_back(make_case("window of both sides", Mask::window(7, 201)));
  all.push_back(make_case("documents", Mask::documents({0, 1, 90, 301, 302, 613}, Mask::causal())));
  // Regions of which rows see several, the later ones in memory first; sinks, a window, stretches far away.
  all.push_back(make_case("regions", Mask::of_regions({{{100, 600}, {500, 610}, -kUnbounded, 200},
                                                       {{40, 600}, {0, 9}},
                                                       {{0, 613}, {9, 480}, -60, 0},
                                                       {{200, 500}, {9, 200}, -kUnbounded, -61}})));
  Case terms = make_case("causal with terms", Mask::causal());
  terms.p.softcap = 3;
  terms.p.slopes = {0.25, 0.125, 0.0625, 0.03125};
  terms.p.bias = {1, kSeq, 4, kSeq};
  terms.p.dropout = {0.2, 5, 6, 0, 4};
  all.push_back(terms);
  return all;
}

std::vector<Positions> shards() {
  std::vector<Positions> all;
  for (const std::int64_t begin : {0, 1, 95, 191, 193, 400, 612}) all.push_back(Positions::range(begin, kSeq));
  for (const std::int64_t end : {1, 4, 5, 97, 200, 611}) all.push_back(Positions::range(0, end));
  all.push_back(Positions({{3, 100, 1}, {500, 100, 1}}));  // zigzag
  all.push_back(Positions({{500, 100, 1}, {3, 100, 1}}));
  for (const std::int64_t step : {2, 5}) all.push_back(Positions({{1, kSeq / step - 1, step}}));
  for (const std::int64_t row : {0, 63, 255, 256, 300, 612}) all.push_back(Positions::range(row, row + 1));
  return all;
}

// The rows of a shard of `from` along axis 1.
Tensor rows_of(const Tensor& from, const Positions& rows) {
  Shape shape = from->shape;
  shape[1] = rows.count();
  Tensor part(from->dtype, shape);
  for (std::int64_t i = 0; i < rows.count(); ++i) copy(from->slice(1, rows.at(i), 1), part->slice(1, i, 1));
  return part;
}

bool equal_rows(const Tensor& part, const TensorView& whole, const Positions& rows) {
  const Tensor contiguous = to_dtype(whole, whole.dtype);
  return same_bits(part, rows_of(contiguous, rows));
}

Tensor by_row(const Tensor& statistic) { return to_dtype(statistic->transpose(1, 2), statistic->dtype); }  // [B, S, H]

// Everything in storage type, and the results of the whole.
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
          Tensor(DType::kF32, {p.batch, p.heads, p.seq_q}),
          run_kernel(cpu_kernel(), p, in, storage)};
  attention_delta(w.dout, w.results.out, w.delta);
  return w;
}

// out, lse and dq of a part of the queries.
void expect_same_queries(const Case& c, const Whole& w, const Positions& rows, const std::string& what) {
  const Tensor q = rows_of(w.q, rows), dout = rows_of(w.dout, rows);
  const Tensor bias = w.bias.defined() ? rows_of(w.bias, rows) : Tensor();
  const auto tiles = make_tiles(c.mask, rows, Positions::range(0, kSeq));
  const ScoreTerms terms = terms_of(c.p, bias);
  const Tensor out(DType::kF32, dout->shape), lse(DType::kF32, {1, c.p.heads, rows.count()}), delta(DType::kF32, lse->shape);
  const Tensor dq(DType::kF32, q->shape), dbias = bias.defined() ? Tensor(DType::kF32, bias->shape) : Tensor();
  cpu_kernel().attend({q, w.k, w.v, c.p.map, tiles, c.p.factor(), out, lse, false, terms, true});
  EXPECT_TRUE(equal_rows(out, w.results.out, rows)) << what << ": out";
  EXPECT_TRUE(equal_rows(by_row(lse), by_row(w.results.lse), rows)) << what << ": lse";
  attention_delta(dout, out, delta);
  cpu_kernel().attend_grad({q, w.k, w.v, c.p.map, tiles, c.p.factor(), dout, lse, delta, dq, {}, {}, terms, true, dbias});
  EXPECT_TRUE(equal_rows(dq, w.results.dq, rows)) << what << ": dq";
  if (bias.defined()) {
    EXPECT_TRUE(equal_rows(dbias, w.results.dbias, rows)) << what << ": dbias";
  }
}

// dk and dv of a part of the keys.
void expect_same_keys(const Case& c, const Whole& w, const Positions& rows, const std::string& what) {
  const Tensor k = rows_of(w.k, rows), v = rows_of(w.v, rows);
  const auto tiles = make_tiles(c.mask, Positions::range(0, kSeq), rows);
  const Tensor dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
  cpu_kernel().attend_grad(
      {w.q, k, v, c.p.map, tiles, c.p.factor(), w.dout, w.results.lse, w.delta, {}, dk, dv, terms_of(c.p, w.bias), true});
  EXPECT_TRUE(equal_rows(dk, w.results.dk, rows)) << what << ": dk";
  EXPECT_TRUE(equal_rows(dv, w.results.dv, rows)) << what << ": dv";
}

TEST_P(CpuInvariant, RowsHaveTheSameBitsInEveryShard) {
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

TEST_P(CpuInvariant, IsStillAttention) {
  for (const Case& c : cases()) check(c.p, c.name);
}

TEST_P(CpuInvariant, ThreadsDoNotChangeABit) {
  for (const Case& c : cases()) {
    const Whole one = run_whole(c.p, DType::kF32);
    set_num_threads(2);
    const Whole two = run_whole(c.p, DType::kF32);
    EXPECT_TRUE(same_bits(one.results.out, two.results.out) && same_bits(one.results.dq, two.results.dq)) << c.name;
    EXPECT_TRUE(same_bits(one.results.dk, two.results.dk) && same_bits(one.results.dv, two.results.dv)) << c.name;
    set_num_threads(1);
  }
}

// Heads of a group in calls of their own, added in ascending order.
TEST_P(CpuInvariant, HeadsOfAGroupAddUpOneByOne) {
  for (const DType storage : {DType::kF32, DType::kBF16}) {
    Case c = make_case("heads", Mask::causal());
    c.p.heads = 6;
    c.p.map.group = 3;
    c.p.dropout = {0.1, 5, 6, 0, 6};
    const Whole w = run_whole(c.p, storage);
    const Tensor dk(DType::kF32, w.k->shape), dv(DType::kF32, w.v->shape);
    for (std::int64_t h = 0; h < c.p.heads; ++h) {
      HeadMap map = c.p.map;
      map.q_begin = h;
      const Tensor dk_part(DType::kF32, w.k->shape), dv_part(DType::kF32, w.v->shape);
      cpu_kernel().attend_grad({w.q->slice(2, h, 1),
                                w.k,
                                w.v,
                                map,
                                c.p.tiles,
                                c.p.factor(),
                                w.dout->slice(2, h, 1),
                                w.results.lse->slice(1, h, 1),
                                w.delta->slice(1, h, 1),
                                {},
                                dk_part,
                                dv_part,
                                terms_of(c.p, w.bias),
                                true});
      add(dk_part, dk);
      add(dv_part, dv);
    }
    EXPECT_TRUE(same_bits(dk, w.results.dk) && same_bits(dv, w.results.dv)) << name_of(storage);
  }
}

DATTN_ON_EVERY_PATH(CpuInvariant);

}  // namespace
}  // namespace dattn
