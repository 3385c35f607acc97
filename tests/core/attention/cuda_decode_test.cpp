// Few queries and long keys, which the cuda kernel gives to several blocks: against the reference, merged with what stands
// there, and with the same bits again.
#include "tests/core/attention/on_cuda.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CudaDecode : public OnCuda {};

// The forward pass alone, into a state of its own or merged into `state`.
Results attend(const Problem& p, const Inputs& inputs, DType storage, const Results* state = nullptr) {
  const DeviceScope scope(kCuda);
  const auto send = [&](const Tensor& tensor, DType type) { return to_device(to_dtype(tensor, type), kCuda); };
  const DType sum = accumulate_type(storage);
  const Tensor q = send(inputs.q, storage), k = send(inputs.k, storage), v = send(inputs.v, storage);
  const Tensor bias = inputs.bias.defined() ? send(inputs.bias, storage) : Tensor();
  const Tensor out = state != nullptr ? send(state->out, sum) : Tensor(sum, {p.batch, p.seq_q, p.heads, p.dim_v});
  const Tensor lse = state != nullptr ? send(state->lse, sum) : Tensor(sum, {p.batch, p.heads, p.seq_q});
  cuda_kernel().attend({q, k, v, p.map, p.tiles, p.factor(), out, lse, state != nullptr, terms_of(p, bias), p.invariant});
  Results results;
  results.out = to_device(out, {});
  results.lse = to_device(lse, {});
  return results;
}

void check(const Problem& p, DType storage, const std::string& what) {
  const Inputs inputs = random_inputs(p, DType::kBF16);
  const Results got = attend(p, inputs, storage), wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
  EXPECT_LE(relative_error(got.out, wanted.out), cuda_tolerance(storage)) << what << " " << name_of(storage);
  EXPECT_LE(relative_error(got.lse, wanted.lse), cuda_tolerance(storage)) << what << " " << name_of(storage);
}

constexpr Precision kEvery[] = {
    {DType::kF32, false}, {DType::kBF16, false}, {DType::kF16, false}, {DType::kF64, false}, {DType::kF32, true}};

TEST_F(CudaDecode, MasksLengthsAndHeads) {
  for (const auto& [storage, tf32] : kEvery) {
    const Tf32Allowed allowed(tf32);
    for (const std::int64_t rows : {1, 3, 40}) {
      check(make_problem(rows, 1100, 1, 1, 16, 24, Mask::full()), storage, fmt::format("full, {} rows", rows));
      check(make_problem(rows, 577, 2, 1, 24, 16, Mask::causal_bottom_right()), storage, fmt::format("causal, {} rows", rows));
    }
    check(make_problem(7, 1300, 1, 1, 16, 16, Mask::window(1, 900)), storage, "window");
    check(make_problem(2, 1500, 1, 1, 16, 16,
                       Mask::blocks(50, {{0, 1}, {0, 7}, {0, 8}, {0, 12}, {0, 13}, {0, 16}, {0, 19}, {0, 22}, {0, 29}})),
          storage, "blocks far apart");
  }
}

TEST_F(CudaDecode, SeveralBatchRowsAndGroupsThatAreCut) {
  Problem p = make_problem(2, 700, 5, 3, 16, 16, Mask::full());
  p.batch = 2;
  p.map = {4, 0, 3};
  for (const auto& [storage, tf32] : kEvery) {
    const Tf32Allowed allowed(tf32);
    check(p, storage, "heads 4 to 8");
  }
}

TEST_F(CudaDecode, ScoreTerms) {
  Problem p = make_problem(2, 800, 2, 1, 16, 24, Mask::full());
  p.softcap = 3;
  p.slopes = {0.01, 0.02};
  p.bias = {1, 2, 2, 800};
  p.dropout = {0.3, 5, 6, 0, 2};
  for (const auto& [storage, tf32] : kEvery) {
    const Tf32Allowed allowed(tf32);
    check(p, storage, "all terms");
  }
}

// Rows that see nothing of some shares, or of all.
TEST_F(CudaDecode, RowsThatSeeNothing) {
  Problem p = make_problem(4, 1200, 1, 1, 16, 16, Mask::full());
  p.tiles = {{{{0, 1}, {0, 1200}}}, {{{1, 2}, {1100, 1200}}}, {{{3, 4}, {0, 600}}}};
  for (const auto& [storage, tf32] : kEvery) {
    const Tf32Allowed allowed(tf32);
    check(p, storage, "row 2 sees nothing");
    const Tensor out = to_dtype(attend(p, random_inputs(p, storage), storage).out, DType::kF64);
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(out->at<double>(0, 2, 0, d), 0.0);
  }
}

// The keys in two calls, the second merged into the first, are the keys in one; states that stand there count.
TEST_F(CudaDecode, MergesIntoWhatStandsThere) {
  for (const auto& [storage, tf32] : kEvery) {
    const Tf32Allowed allowed(tf32);
    Problem p = make_problem(3, 1300, 2, 1, 16, 16, Mask::full());
    const Inputs inputs = random_inputs(p, DType::kBF16);
    const Results wanted = run_kernel(reference_kernel(), p, inputs, DType::kF64);
    p.tiles = {{{{0, 3}, {0, 620}}}};
    const Results first = attend(p, inputs, storage);
    p.tiles = {{{{0, 3}, {620, 1300}}}};
    const Results both = attend(p, inputs, storage, &first);
    EXPECT_LE(relative_error(both.out, wanted.out), cuda_tolerance(storage)) << name_of(storage);
    EXPECT_LE(relative_error(both.lse, wanted.lse), cuda_tolerance(storage)) << name_of(storage);
  }
}

TEST_F(CudaDecode, TwoRunsHaveTheSameBits) {
  const Problem p = make_problem(2, 5000, 2, 1, 16, 16, Mask::causal_bottom_right());
  for (const auto& [storage, tf32] : {Precision{DType::kF32, false}, {DType::kBF16, false}, {DType::kF32, true}}) {
    const Tf32Allowed allowed(tf32);
    const Inputs inputs = random_inputs(p, storage);
    const Results one = attend(p, inputs, storage), two = attend(p, inputs, storage);
    EXPECT_TRUE(same_bits(one.out, two.out) && same_bits(one.lse, two.lse)) << name_of(storage);
  }
}

TEST_F(CudaDecode, NaNAndInfinityAreNotSwallowed) {
  const Problem p = make_problem(2, 1200, 1, 1, 16, 16, Mask::full());
  for (const std::int64_t key : {3, 700, 1199}) {
    const Inputs inputs = random_inputs(p, DType::kF32);
    inputs.k.ptr<double>()[key * 16] = std::nan("");
    const Results r = attend(p, inputs, DType::kF32);
    EXPECT_TRUE(std::isnan(r.out->at<float>(0, 0, 0, 3)) && std::isnan(r.out->at<float>(0, 1, 0, 3))) << key;
  }
}

}  // namespace
}  // namespace dattn
