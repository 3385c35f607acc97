// The cpu kernel against the reference in fp64, on every instruction set of this machine.
#include <cmath>
#include <cstring>

#include <gtest/gtest.h>

#include "tests/core/attention/every_path.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CpuKernel : public EveryPath {};

TEST_P(CpuKernel, Dims) {
  const std::pair<std::int64_t, std::int64_t> dims[] = {{1, 1},   {5, 3},     {16, 16},   {40, 40},   {64, 64},
                                                        {96, 96}, {128, 128}, {192, 128}, {256, 256}, {17, 100}};
  for (const auto& [dim_qk, dim_v] : dims) {
    check(make_problem(131, 197, 2, 1, dim_qk, dim_v, Mask::full()), fmt::format("full {}x{}", dim_qk, dim_v));
    check(make_problem(131, 131, 1, 1, dim_qk, dim_v, Mask::causal()), fmt::format("causal {}x{}", dim_qk, dim_v));
  }
}

TEST_P(CpuKernel, Lengths) {
  for (const std::int64_t seq : {1, 2, 4, 5, 6, 7, 63, 65, 96, 97, 192, 193, 255, 257, 521}) {
    check(make_problem(seq, seq, 1, 1, 24, 24, Mask::causal()), fmt::format("causal S = {}", seq));
    check(make_problem(seq, 2 * seq + 3, 1, 1, 24, 24, Mask::full()), fmt::format("full S = {}", seq));
    check(make_problem(2 * seq + 3, seq, 1, 1, 24, 24, Mask::causal()), fmt::format("fewer keys S = {}", seq));
  }
}

TEST_P(CpuKernel, DecodeReadsManyKeys) {
  for (const std::int64_t rows : {1, 3, 4}) {
    check(make_problem(rows, 2500, 4, 2, 64, 40, Mask::full()), fmt::format("{} rows", rows));
    Problem p = make_problem(rows, 2500, 2, 2, 17, 64, Mask::full());
    p.tiles = {{{{0, rows}, {0, 2500}, 100, 2300}}};
    check(p, fmt::format("{} rows in a band", rows));
  }
}

// One row for each KV head: where there are few heads, of common dims, the sums stay in registers.
TEST_P(CpuKernel, DecodeOfOneRowAHead) {
  for (const std::int64_t heads : {1, 2, 3, 4, 6, 7}) {
    for (const std::int64_t dim : {64, 128}) {
      Problem p = make_problem(1, 1700, heads, heads, dim, dim, Mask::full());
      check(p, fmt::format("{} heads of {}", heads, dim));
      p.tiles = {{{{0, 1}, {0, 1700}, 100, 1300}}};  // in registers, in memory, and not at all
      check(p, fmt::format("{} heads of {} in a band", heads, dim));
    }
  }
}

// Few blocks of rows against many keys, which are then cut into parts, some of which rows see nothing of.
TEST_P(CpuKernel, FewRowsAgainstManyKeys) {
  for (const std::int64_t rows : {5, 97, 300}) {
    check(make_problem(rows, 3001, 2, 1, 64, 40, Mask::full()), fmt::format("{} rows", rows));
    Problem p = make_problem(rows, 3001, 1, 1, 17, 64, Mask::full());
    p.tiles = {{{{0, rows}, {7, 3001}, 100, 1100}}, {{{3, rows}, {3, 7}}}};
    check(p, fmt::format("{} rows in a band", rows));
    p.tiles = make_tiles(compile(Mask::window(900, 0), 6100, 6100), Positions({{100, rows, 19}}), Positions({{1, 3001, 2}}));
    check(p, fmt::format("{} rows of another step", rows));
  }
}

TEST_P(CpuKernel, Bands) {
  for (const auto& [left, right] : {std::pair{0, 0}, {1, 0}, {7, 3}, {64, 0}, {63, 64}, {130, 5}, {5, 200}, {-1, 3}, {3, -1}}) {
    check(make_problem(301, 301, 1, 1, 32, 32, Mask::window(left, right)), fmt::format("window {} {}", left, right));
    check(make_problem(301, 150, 1, 1, 32, 32, Mask::window(left, right)),
          fmt::format("window {} {}, fewer keys", left, right));
  }
}

TEST_P(CpuKernel, ManyTilesOfOneRow) {
  check(make_problem(333, 333, 2, 1, 32, 32, Mask::documents({0, 1, 50, 50, 113, 290, 333}, Mask::causal())), "documents");
  // Sinks, a window, a stretch far away and rows 150 to 159 that see nothing.
  const Mask mask = Mask::of_regions({{{0, 150}, {0, 7}},
                                      {{160, 400}, {0, 7}},
                                      {{0, 150}, {7, 400}, -33, 0},
                                      {{160, 400}, {7, 390}, -33, 0},
                                      {{200, 333}, {395, 400}},
                                      {{100, 140}, {300, 310}, 190, 200}});
  check(make_problem(400, 400, 1, 1, 32, 32, mask), "regions");
}

TEST_P(CpuKernel, GroupsThatAreCutUnevenly) {
  Problem p = make_problem(70, 90, 5, 3, 16, 16, Mask::full());  // query heads 4..8 of groups of 3: KV heads 1, 1, 2, 2, 2
  p.batch = 2;
  p.map = {4, 0, 3};
  check(p, "heads 4 to 8");
  p.kv_heads = 2;
  p.map.kv_begin = 1;
  check(p, "heads 4 to 8, KV heads from 1");
}

TEST_P(CpuKernel, HugeScoresAndOddScales) {
  Problem p = make_problem(140, 700, 1, 1, 64, 64, Mask::full());
  p.magnitude = 12.0f;  // scores up to +-5,000 before the scale: softmax is nearly one-hot, maxima move late
  const Inputs inputs = random_inputs(p, DType::kBF16);
  // The last keys have by far the largest scores.
  for (std::int64_t i = inputs.k->elements() - 64; i < inputs.k->elements(); ++i) inputs.k.ptr<double>()[i] *= 16;
  const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  const Results got = run_kernel(cpu_kernel(), p, inputs, DType::kF32);
  EXPECT_LE(relative_error(got.lse, wanted.lse), kFp32Tolerance);
  EXPECT_LE(relative_error(got.out, wanted.out), 1e-4);  // an error of 2^-24 in a score of 2,000 is 1e-4 in p
  p.magnitude = 1.0f;
  for (const double scale : {-0.3, 1e-30, 0.7}) {
    p.scale = scale;
    const Inputs small = random_inputs(p, DType::kBF16);
    expect_close(run_kernel(cpu_kernel(), p, small, DType::kF32), run_kernel(reference_kernel(), p, small, DType::kF64),
                 3 * kFp32Tolerance, fmt::format("scale {}", scale));
  }
}

TEST_P(CpuKernel, RowsThatSeeNothing) {
  Problem p = make_problem(200, 200, 2, 2, 32, 32, Mask::full());
  p.tiles = {{{{10, 20}, {30, 150}}}, {{{100, 190}, {100, 200}, -kUnbounded, 0}}};
  const Results r = run_kernel(cpu_kernel(), p, random_inputs(p, DType::kF32), DType::kF32);
  for (const std::int64_t row : {0, 9, 20, 99, 190, 199}) {
    EXPECT_EQ(r.lse->at<float>(0, 1, row), -std::numeric_limits<float>::infinity());
    EXPECT_EQ(r.out->at<float>(0, row, 1, 31), 0.0f);
    EXPECT_EQ(r.dq->at<float>(0, row, 1, 31), 0.0f);
  }
  EXPECT_EQ(r.dk->at<float>(0, 29, 1, 0), 0.0f);
  EXPECT_NE(r.dk->at<float>(0, 30, 1, 0), 0.0f);
  check(p, "rows that see nothing");
  p.tiles.clear();
  const Results none = run_kernel(cpu_kernel(), p, random_inputs(p, DType::kF32), DType::kF32);
  EXPECT_EQ(none.out->at<float>(0, 5, 0, 0), 0.0f);
  EXPECT_EQ(none.lse->at<float>(0, 0, 5), -std::numeric_limits<float>::infinity());
}

// Copies a tensor into a buffer [H, S, B, D + 3], so that every axis but the last is permuted and padded.
Tensor spread(const Tensor& from, TensorView& view) {
  const Shape s = from->shape;
  Tensor memory(from->dtype, {s[2], s[1], s[0], s[3] + 3});
  view = memory->transpose(0, 2).slice(3, 0, s[3]);
  copy(from, view);
  return memory;
}

TEST_P(CpuKernel, StridedViews) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    Problem p = make_problem(100, 77, 3, 3, 20, 36, Mask::window(40, 2));
    p.batch = 2;
    const Inputs inputs = random_inputs(p, storage);
    const Results plain = run_kernel(cpu_kernel(), p, inputs, storage);
    TensorView q, k, v, dout, out, dq, dk, dv;
    const Tensor memory[] = {spread(to_dtype(inputs.q, storage), q),
                             spread(to_dtype(inputs.k, storage), k),
                             spread(to_dtype(inputs.v, storage), v),
                             spread(to_dtype(inputs.dout, storage), dout),
                             spread(Tensor(DType::kF32, plain.out->shape), out),
                             spread(Tensor(DType::kF32, plain.dq->shape), dq),
                             spread(Tensor(DType::kF32, plain.dk->shape), dk),
                             spread(Tensor(DType::kF32, plain.dv->shape), dv)};
    const Tensor lse_memory(DType::kF32, {p.seq_q, 2, p.heads}), delta(DType::kF32, plain.lse->shape);
    const TensorView lse = lse_memory->transpose(0, 2).transpose(0, 1);  // [2, H, S]
    cpu_kernel().attend({q, k, v, p.map, p.tiles, p.factor(), out, lse, false});
    attention_delta(dout, out, delta);
    cpu_kernel().attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, dq, dk, dv});
    const auto same = [](const TensorView& a, const Tensor& b) { return relative_error(to_dtype(a, DType::kF32), b) == 0.0; };
    EXPECT_TRUE(same(out, plain.out) && same(lse, plain.lse));
    EXPECT_TRUE(same(dq, plain.dq) && same(dk, plain.dk) && same(dv, plain.dv));
  }
}

// Attending to a random partition of the keys, piece by piece, is attending to all of them.
TEST_P(CpuKernel, MergesPiecesOfTheKeys) {
  for (const auto& [seq, keys] : {std::pair{3, 301}, {150, 301}, {150, 4001}}) {
    Problem p = make_problem(seq, keys, 2, 1, 32, 48, Mask::full());
    if (keys == 301) p.tiles = tiles_of(Mask::window(100, 50), seq, 301);
    const Inputs inputs = random_inputs(p, DType::kF32);
    const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
    const Tensor q = to_dtype(inputs.q, DType::kF32), k = to_dtype(inputs.k, DType::kF32), v = to_dtype(inputs.v, DType::kF32);
    const Tensor dout = to_dtype(inputs.dout, DType::kF32);
    Results got{Tensor(DType::kF32, wanted.out->shape), Tensor(DType::kF32, wanted.lse->shape), Tensor(DType::kF32, q->shape),
                Tensor(DType::kF32, k->shape), Tensor(DType::kF32, v->shape)};
    clear_state(got.out, got.lse);
    const std::vector<std::int64_t> cuts = {0, 1, 40, 41, 150, 299, keys};
    const auto each_piece = [&](const auto& body) {
      for (const std::size_t i : {3u, 0u, 5u, 1u, 4u, 2u}) {
        std::vector<Tile> tiles;
        for (const Tile& tile : p.tiles) {
          const auto part = restrict_to(tile.rows, tile.rows.q, {cuts[i], cuts[i + 1]});
          if (part) tiles.push_back({shift(*part, 0, -cuts[i])});
        }
        body(cuts[i], cuts[i + 1] - cuts[i], tiles);
      }
    };
    each_piece([&](std::int64_t begin, std::int64_t count, const std::vector<Tile>& tiles) {
      cpu_kernel().attend(
          {q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), got.out, got.lse, true});
    });
    const Tensor delta(DType::kF32, got.lse->shape);
    attention_delta(dout, got.out, delta);
    each_piece([&](std::int64_t begin, std::int64_t count, const std::vector<Tile>& tiles) {
      cpu_kernel().attend_grad({q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), dout,
                                got.lse, delta, got.dq, got.dk->slice(1, begin, count), got.dv->slice(1, begin, count)});
    });
    expect_close(got, wanted, kFp32Tolerance, fmt::format("S = {}, {} keys in 6 pieces", seq, keys));
  }
}

TEST_P(CpuKernel, ThreadsDoNotChangeABit) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::int64_t seq : {2, 150, 700}) {
      Problem p = make_problem(seq, 2100, 2, 1, 32, 32, Mask::full());
      const Inputs inputs = random_inputs(p, storage);
      set_num_threads(1);
      const Results one = run_kernel(cpu_kernel(), p, inputs, storage);
      for (const int threads : {2, 3, 7}) {
        set_num_threads(threads);
        const Results many = run_kernel(cpu_kernel(), p, inputs, storage);
        const auto same = [](const Tensor& a, const Tensor& b) {
          return std::memcmp(a.ptr<void>(), b.ptr<void>(), static_cast<std::size_t>(a->bytes())) == 0;
        };
        EXPECT_TRUE(same(one.out, many.out) && same(one.lse, many.lse)) << threads << " threads, S = " << seq;
        EXPECT_TRUE(same(one.dq, many.dq) && same(one.dk, many.dk) && same(one.dv, many.dv))
            << threads << " threads, S = " << seq;
      }
    }
  }
}

TEST_P(CpuKernel, NothingToDo) {
  for (const auto& [seq, keys, heads] : {std::tuple{0, 5, 2}, {5, 0, 2}, {5, 5, 0}}) {
    Problem p = make_problem(seq, keys, heads, 1, 8, 8, Mask::full());
    p.map.group = 2;
    const Results r = run_kernel(cpu_kernel(), p, random_inputs(p, DType::kF32), DType::kF32);
    for (std::int64_t i = 0; i < r.lse->elements(); ++i)
      EXPECT_EQ(r.lse.ptr<float>()[i], -std::numeric_limits<float>::infinity());
  }
}

TEST_P(CpuKernel, NaNIsNotSwallowed) {
  Problem p = make_problem(40, 100, 1, 1, 32, 32, Mask::full());
  const Inputs inputs = random_inputs(p, DType::kF32);
  inputs.q.ptr<double>()[7 * 32] = std::nan("");
  const Results r = run_kernel(cpu_kernel(), p, inputs, DType::kF32);
  EXPECT_TRUE(std::isnan(r.out->at<float>(0, 7, 0, 3)));
  EXPECT_FALSE(std::isnan(r.out->at<float>(0, 6, 0, 3)));
}

DATTN_ON_EVERY_PATH(CpuKernel);

TEST(CpuPath, UnknownNameIsRefused) {
  const ScopedEnv env("DATTN_CPU", "mmx");
  EXPECT_THROW(cpu::choose_path(), Error);
}

}  // namespace
}  // namespace dattn
