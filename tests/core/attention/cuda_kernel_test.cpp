// The cuda kernel on a device (the stand-in, without one) against the reference in fp64: masks, dims, heads, views, pieces.
#include <bit>
#include <utility>

#include "tests/core/attention/on_cuda.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CudaKernel : public OnCuda {};

TEST_F(CudaKernel, Dims) {
  const std::pair<std::int64_t, std::int64_t> dims[] = {{1, 1},   {5, 3},     {16, 16},   {40, 64},  {96, 72},
                                                        {128, 8}, {192, 128}, {256, 256}, {17, 100}, {200, 16}};
  for (const auto& [dim_qk, dim_v] : dims) {
    check_cuda(make_problem(70, 131, 1, 1, dim_qk, dim_v, Mask::full()), fmt::format("full {}x{}", dim_qk, dim_v));
    check_tensor_cores(make_problem(131, 131, 1, 1, dim_qk, dim_v, Mask::causal()), fmt::format("causal {}x{}", dim_qk, dim_v));
  }
}

TEST_F(CudaKernel, Fp64) {
  check_cuda(make_problem(70, 90, 2, 1, 20, 40, Mask::causal()), DType::kF64, "causal");
  Problem p = make_problem(65, 70, 2, 2, 150, 3, Mask::window(30, 5));
  p.softcap = 3;
  p.bias = {1, 65, 2, 70};
  p.dropout = {0.2, 5, 6, 0, 2};
  check_cuda(p, DType::kF64, "window with terms");
}

TEST_F(CudaKernel, Lengths) {
  for (const std::int64_t seq : {1, 2, 31, 33, 63, 64, 65, 128, 129}) {
    check_cuda(make_problem(seq, seq, 1, 1, 24, 24, Mask::causal()), fmt::format("causal S = {}", seq));
    check_tensor_cores(make_problem(seq, 2 * seq + 3, 1, 1, 24, 24, Mask::full()), fmt::format("full S = {}", seq));
    check_tensor_cores(make_problem(2 * seq + 3, seq, 1, 1, 24, 24, Mask::causal()), fmt::format("fewer keys S = {}", seq));
  }
}

TEST_F(CudaKernel, Bands) {
  for (const auto& [left, right] : {std::pair{0, 0}, {7, 3}, {64, 0}, {63, 64}, {130, 5}, {-1, 3}, {3, -1}}) {
    check_cuda(make_problem(201, 201, 1, 1, 16, 16, Mask::window(left, right)), fmt::format("window {} {}", left, right));
    check_cuda(make_problem(201, 120, 1, 1, 16, 16, Mask::window(left, right)), DType::kBF16,
               fmt::format("window {} {}, fewer keys", left, right));
  }
}

TEST_F(CudaKernel, ManyTilesOfOneRow) {
  check_cuda(make_problem(240, 240, 2, 1, 16, 16, Mask::documents({0, 1, 50, 50, 113, 190, 240}, Mask::causal())), "documents");
  // Sinks, a window, a stretch far away and rows 120 to 129 that see nothing.
  const Mask mask = Mask::of_regions({{{0, 120}, {0, 7}},
                                      {{130, 270}, {0, 7}},
                                      {{0, 120}, {7, 270}, -33, 0},
                                      {{130, 270}, {7, 260}, -33, 0},
                                      {{200, 233}, {265, 270}},
                                      {{60, 100}, {210, 220}, 150, 160}});
  check_cuda(make_problem(270, 270, 1, 1, 16, 16, mask), "regions");
}

TEST_F(CudaKernel, GroupsThatAreCutUnevenly) {
  Problem p = make_problem(70, 90, 5, 3, 16, 16, Mask::full());  // query heads 4..8 of groups of 3: KV heads 1, 1, 2, 2, 2
  p.batch = 2;
  p.map = {4, 0, 3};
  check_cuda(p, "heads 4 to 8");
  p.kv_heads = 2;
  p.map.kv_begin = 1;
  check_cuda(p, "heads 4 to 8, KV heads from 1");
}

TEST_F(CudaKernel, HugeScoresAndOddScales) {
  Problem p = make_problem(70, 200, 1, 1, 64, 64, Mask::full());
  p.magnitude = 12.0f;  // scores up to +-5,000 before the scale: softmax is nearly one-hot, maxima move late
  const Inputs inputs = random_inputs(p, DType::kBF16);
  // The last keys have by far the largest scores.
  for (std::int64_t i = inputs.k->elements() - 64; i < inputs.k->elements(); ++i) inputs.k.ptr<double>()[i] *= 16;
  const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    const Results got = run_cuda(p, inputs, storage);
    EXPECT_LE(relative_error(got.lse, wanted.lse), kFp32Tolerance);
    EXPECT_LE(relative_error(got.out, wanted.out), storage == DType::kF32 && !tf32 ? 1e-4 : cuda_tolerance(storage));
  }
  p.magnitude = 1.0f;
  for (const double scale : {-0.3, 1e-30, 1e-60, 0.7}) {  // 1e-60 is 0 in fp32
    p.scale = scale;
    check_tensor_cores(p, fmt::format("scale {}", scale));
  }
}

TEST_F(CudaKernel, RowsThatSeeNothing) {
  Problem p = make_problem(200, 200, 1, 1, 16, 16, Mask::full());
  p.tiles = {{{{10, 20}, {30, 150}}}, {{{100, 190}, {100, 200}, -kUnbounded, 0}}};
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    const Results r = run_cuda(p, random_inputs(p, storage), storage);
    for (const std::int64_t row : {0, 9, 20, 99, 190, 199}) {
      EXPECT_EQ(r.lse->at<float>(0, 0, row), -std::numeric_limits<float>::infinity());
      EXPECT_EQ(r.out->at<float>(0, row, 0, 15), 0.0f);
      EXPECT_EQ(r.dq->at<float>(0, row, 0, 15), 0.0f);
    }
    EXPECT_EQ(r.dk->at<float>(0, 29, 0, 0), 0.0f);
    EXPECT_NE(r.dk->at<float>(0, 30, 0, 0), 0.0f);
  }
  check_cuda(p, "rows that see nothing");
  p.tiles.clear();
  const Results none = run_cuda(p, random_inputs(p, DType::kF32), DType::kF32);
  EXPECT_EQ(none.out->at<float>(0, 5, 0, 0), 0.0f);
  EXPECT_EQ(none.lse->at<float>(0, 0, 5), -std::numeric_limits<float>::infinity());
}

TEST_F(CudaKernel, NothingToDo) {
  for (const auto& [seq, keys, heads] : {std::tuple{0, 5, 2}, {5, 0, 2}, {5, 5, 0}}) {
    Problem p = make_problem(seq, keys, heads, 1, 8, 8, Mask::full());
    p.map.group = 2;
    const Results r = run_cuda(p, random_inputs(p, DType::kF32), DType::kF32);
    for (std::int64_t i = 0; i < r.lse->elements(); ++i)
      EXPECT_EQ(r.lse.ptr<float>()[i], -std::numeric_limits<float>::infinity());
  }
}

TEST_F(CudaKernel, NaNIsNotSwallowed) {
  const Problem p = make_problem(40, 100, 1, 1, 32, 32, Mask::full());
  const Inputs inputs = random_inputs(p, DType::kF32);
  inputs.q.ptr<double>()[7 * 32] = std::nan("");
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    const Results r = run_cuda(p, inputs, storage);
    EXPECT_TRUE(std::isnan(r.out->at<float>(0, 7, 0, 3)));
    EXPECT_FALSE(std::isnan(r.out->at<float>(0, 6, 0, 3)));
  }
}

// A tensor's copy on the device in a buffer [H, S, B, D + padding], so that every axis but the last is permuted and padded.
Tensor spread(const Tensor& from, std::int64_t padding, TensorView& view) {
  const Shape s = from->shape;
  Tensor memory(from->dtype, {s[2], s[1], s[0], s[3] + padding});
  view = memory->transpose(0, 2).slice(3, 0, s[3]);
  copy(to_device(from, kCuda), view);
  return memory;
}

TEST_F(CudaKernel, StridedViews) {
  const std::pair<Precision, std::int64_t> cases[] = {{{DType::kF32, false}, 3},  {{DType::kBF16, false}, 8},
                                                      {{DType::kBF16, false}, 3}, {{DType::kF16, false}, 8},
                                                      {{DType::kF32, true}, 4},   {{DType::kF32, true}, 3}};
  for (const auto& [precision, padding] : cases) {
    const auto& [storage, tf32] = precision;
    const Tf32Allowed allowed(tf32);
    Problem p = make_problem(80, 77, 2, 2, 24, 40, Mask::window(40, 2));
    p.batch = 2;
    const Inputs inputs = random_inputs(p, storage);
    const Results plain = run_cuda(p, inputs, storage);
    const DeviceScope scope(kCuda);
    TensorView q, k, v, dout, out, dq, dk, dv;
    const auto zeros = [](const Tensor& like) { return to_dtype(Tensor(DType::kF32, like->shape), DType::kF32); };
    const Tensor memory[] = {spread(to_dtype(inputs.q, storage), padding, q),
                             spread(to_dtype(inputs.k, storage), padding, k),
                             spread(to_dtype(inputs.v, storage), padding, v),
                             spread(to_dtype(inputs.dout, storage), padding, dout),
                             spread(zeros(plain.out), 3, out),
                             spread(zeros(plain.dq), 3, dq),
                             spread(zeros(plain.dk), 3, dk),
                             spread(zeros(plain.dv), 3, dv)};
    const Tensor lse_memory(DType::kF32, {p.seq_q, 2, p.heads}), delta(DType::kF32, plain.lse->shape);
    const TensorView lse = lse_memory->transpose(0, 2).transpose(0, 1);  // [2, H, S]
    cuda_kernel().attend({q, k, v, p.map, p.tiles, p.factor(), out, lse, false});
    attention_delta(dout, out, delta);
    cuda_kernel().attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, dq, dk, dv});
    // Rows that are not aligned take another path.
    const double tolerance = padding != 3 ? 0.0 : storage == DType::kBF16 ? kBf16Rounding : tf32 ? 1e-3 : 0.0;
    const auto close = [&](const TensorView& a, const Tensor& b) {
      return relative_error(to_device(to_dtype(a, DType::kF32), {}), b) <= tolerance;
    };
    EXPECT_TRUE(close(out, plain.out) && close(lse, plain.lse)) << name_of(storage) << padding;
    EXPECT_TRUE(close(dq, plain.dq) && close(dk, plain.dk) && close(dv, plain.dv)) << name_of(storage) << padding;
  }
}

// Attending to a random partition of the keys, piece by piece, is attending to all of them.
TEST_F(CudaKernel, MergesPiecesOfTheKeys) {
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    Problem p = make_problem(90, 201, 2, 1, 16, 24, Mask::full());
    p.tiles = tiles_of(Mask::window(100, 50), 90, 201);
    const Inputs inputs = random_inputs(p, DType::kBF16);
    const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
    const DeviceScope scope(kCuda);
    const auto send = [&](const Tensor& tensor) { return to_device(to_dtype(tensor, storage), kCuda); };
    const Tensor q = send(inputs.q), k = send(inputs.k), v = send(inputs.v), dout = send(inputs.dout);
    const Results got{Tensor(DType::kF32, wanted.out->shape), Tensor(DType::kF32, wanted.lse->shape),
                      Tensor(DType::kF32, q->shape), Tensor(DType::kF32, k->shape), Tensor(DType::kF32, v->shape)};
    clear_state(got.out, got.lse);
    const std::vector<std::int64_t> cuts = {0, 1, 40, 41, 150, 199, 201};
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
      cuda_kernel().attend(
          {q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), got.out, got.lse, true});
    });
    const Tensor delta(DType::kF32, got.lse->shape);
    attention_delta(dout, got.out, delta);
    each_piece([&](std::int64_t begin, std::int64_t count, const std::vector<Tile>& tiles) {
      cuda_kernel().attend_grad({q, k->slice(1, begin, count), v->slice(1, begin, count), p.map, tiles, p.factor(), dout,
                                 got.lse, delta, got.dq, got.dk->slice(1, begin, count), got.dv->slice(1, begin, count)});
    });
    const auto bring = [](const Tensor& tensor) { return to_device(tensor, {}); };
    expect_close({bring(got.out), bring(got.lse), bring(got.dq), bring(got.dk), bring(got.dv)}, wanted, cuda_tolerance(storage),
                 "6 pieces");
  }
}

// What is not wanted is not touched, and the rest has the same bits.
TEST_F(CudaKernel, GradientsOfOneSideAlone) {
  const std::pair<Precision, std::int64_t> cases[] = {{{DType::kF32, false}, 16},   {{DType::kBF16, false}, 16},
                                                      {{DType::kBF16, false}, 256}, {{DType::kF16, false}, 256},
                                                      {{DType::kF32, true}, 16},    {{DType::kF32, true}, 128}};
  for (const auto& [precision, dim] : cases) {
    const auto& [storage, tf32] = precision;
    const Tf32Allowed allowed(tf32);
    const Problem p = make_problem(70, 90, 2, 1, dim, dim, Mask::causal());
    const Inputs inputs = random_inputs(p, storage);
    const Results both = run_cuda(p, inputs, storage);
    const DeviceScope scope(kCuda);
    const auto send = [&](const Tensor& tensor) { return to_device(to_dtype(tensor, storage), kCuda); };
    const Tensor q = send(inputs.q), k = send(inputs.k), v = send(inputs.v), dout = send(inputs.dout);
    const Tensor lse = to_device(both.lse, kCuda), delta(DType::kF32, both.lse->shape), dq(DType::kF32, q->shape),
                 dk(DType::kF32, k->shape), dv(DType::kF32, v->shape);
    attention_delta(dout, to_device(both.out, kCuda), delta);
    cuda_kernel().attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, dq, {}, {}});
    cuda_kernel().attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, lse, delta, {}, dk, dv});
    EXPECT_TRUE(same_bits(to_device(dq, {}), both.dq)) << name_of(storage) << dim;
    EXPECT_TRUE(same_bits(to_device(dk, {}), both.dk) && same_bits(to_device(dv, {}), both.dv)) << name_of(storage) << dim;
  }
}

// The values that the kernel multiplies.
Inputs rounded_to_tf32(const Inputs& inputs) {
  const auto rounded = [](const Tensor& tensor) {
    Tensor result = to_dtype(tensor, DType::kF32);
    for (std::int64_t i = 0; i < result->elements(); ++i) {
      float& x = result.ptr<float>()[i];
      x = std::bit_cast<float>((std::bit_cast<std::uint32_t>(x) + 0x1000u) & 0xffffe000u);
    }
    return to_dtype(result, DType::kF64);
  };
  return {rounded(inputs.q), rounded(inputs.k), rounded(inputs.v), rounded(inputs.dout), Tensor()};
}

// To the nearest, in both passes, where it is allowed and there is room for it; elsewhere nothing changes.
TEST_F(CudaKernel, Tf32RoundsTheFactors) {
  for (const auto& [dim_qk, dim_v] :
       {std::pair<std::int64_t, std::int64_t>{64, 64}, {128, 128}, {192, 128}, {30, 64}, {256, 64}}) {
    const bool rounds = dim_qk % 4 == 0 && dim_qk <= 192;
    Problem p = make_problem(70, 90, 2, 1, dim_qk, dim_v, Mask::causal());
    p.softcap = 20;
    const std::string what = fmt::format("{}x{}", dim_qk, dim_v);
    const Inputs inputs = random_inputs(p, DType::kF32);
    const Results exact = run_cuda(p, inputs, DType::kF32), wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
    const Tf32Allowed allowed;
    const Results got = run_cuda(p, inputs, DType::kF32), again = run_cuda(p, rounded_to_tf32(inputs), DType::kF32);
    expect_close(got, wanted, rounds ? 1e-3 : kFp32Tolerance, what);
    EXPECT_EQ(same_bits(got.out, exact.out) && same_bits(got.dq, exact.dq) && same_bits(got.dv, exact.dv), !rounds) << what;
    EXPECT_EQ(same_bits(got.out, again.out) && same_bits(got.lse, again.lse), rounds) << what;
    if (!rounds) continue;
    // dout reaches delta unrounded.
    EXPECT_TRUE(same_bits(got.dv, again.dv)) << what;
    EXPECT_GT(relative_error(got.dq, wanted.dq), 1e-5) << what;
    EXPECT_GT(relative_error(got.dk, wanted.dk), 1e-5) << what;
  }
}

// fp32 has its bits again where TF32 is no longer allowed, and all else has them where it is.
TEST_F(CudaKernel, Tf32ChangesNothingElse) {
  const Problem p = make_problem(70, 90, 2, 1, 64, 64, Mask::causal());
  const Inputs inputs = random_inputs(p, DType::kF32);
  const auto same = [](const Results& a, const Results& b) {
    return same_bits(a.out, b.out) && same_bits(a.lse, b.lse) && same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) &&
           same_bits(a.dv, b.dv);
  };
  const auto run = [&](DType storage, bool tf32) {
    const Tf32Allowed allowed(tf32);
    return run_cuda(p, inputs, storage);
  };
  const Results before = run(DType::kF32, false);
  EXPECT_FALSE(same(before, run(DType::kF32, true)));
  EXPECT_TRUE(same(before, run(DType::kF32, false)));
  for (const DType storage : {DType::kBF16, DType::kF16, DType::kF64})
    EXPECT_TRUE(same(run(storage, false), run(storage, true))) << name_of(storage);
}

}  // namespace
}  // namespace dattn
