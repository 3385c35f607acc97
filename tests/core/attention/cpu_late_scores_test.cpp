// The forward pass takes a row's maximum from the first keys that it sees and does a block of rows again where that was too
// low: scores that rise far above those of the first keys, in everything that a call can have.
#include <cmath>
#include <functional>
#include <numbers>

#include "tests/core/attention/every_path.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CpuLateScores : public EveryPath {};

constexpr std::int64_t kRows = 100, kKeys = 700, kLate = 555;

struct State {
  Tensor out, lse;
};

// Out and lse of one call for each of `pieces`, the first of which writes and the others merge.
State forward_of(const AttentionKernel& kernel, const Problem& p, const Inputs& inputs, DType storage,
                 const std::vector<std::vector<Tile>>& pieces) {
  const Tensor q = to_dtype(inputs.q, storage), k = to_dtype(inputs.k, storage), v = to_dtype(inputs.v, storage);
  const Tensor bias = inputs.bias.defined() ? to_dtype(inputs.bias, storage) : Tensor();
  const DType sums = accumulate_type(storage);
  State state{Tensor(sums, {p.batch, p.seq_q, p.heads, p.dim_v}), Tensor(sums, {p.batch, p.heads, p.seq_q})};
  bool merge = false;
  for (const auto& tiles : pieces) {
    kernel.attend({q, k, v, p.map, tiles, p.factor(), state.out, state.lse, merge, terms_of(p, bias), p.invariant});
    merge = true;
  }
  return state;
}

// Scores of key kLate lie `rise` exponents of 2 above the others, but not in every row.
Inputs inputs_that_rise(const Problem& p, int rise, DType storage) {
  Inputs inputs = random_inputs(p, storage);
  double *q = inputs.q.ptr<double>(), *k = inputs.k.ptr<double>();
  for (std::int64_t row = 0; row < p.seq_q; ++row)
    q[row * p.dim_qk] = row % 7 == 3 ? 0 : 1;  // some rows of a strip see no rise
  for (std::int64_t key = 0; key < p.seq_kv; ++key)
    k[key * p.dim_qk] = key == kLate ? std::round(rise * std::numbers::ln2 / p.scale) : 0;
  inputs.k = to_dtype(to_dtype(inputs.k, storage), DType::kF64);
  return inputs;
}

void expect_reference(const Problem& p, const Inputs& inputs, DType storage, const std::vector<std::vector<Tile>>& pieces,
                      const std::string& what) {
  const State wanted = forward_of(reference_kernel(), p, inputs, DType::kF64, pieces);
  const State got = forward_of(cpu_kernel(), p, inputs, storage, pieces);
  const bool half = storage == DType::kBF16;
  EXPECT_LE(relative_error(got.out, wanted.out), half ? 1.5 * kBf16Rounding : 3 * kFp32Tolerance) << what << ": out";
  EXPECT_LE(relative_error(got.lse, wanted.lse), half ? 1e-5 : 3 * kFp32Tolerance) << what << ": lse";
}

Problem late_problem(std::int64_t keys) {
  Problem p = make_problem(kRows, keys, 1, 1, 32, 32, Mask::window(-1, keys - 160));  // of kKeys, some rows do not see kLate
  p.scale = 0.125;
  return p;
}

// Up to what one number holds, and beyond; also where only the output would not fit.
TEST_P(CpuLateScores, OfEverySize) {
  const Problem p = late_problem(kKeys);
  for (const DType storage : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const float value : {1.0f, 1e30f}) {
      if (storage == DType::kF16 && value > 1) continue;  // which it does not hold
      for (const int rise : {10, 50, 59, 61, 100, 126, 130, 300, 2000}) {
        const Inputs inputs = inputs_that_rise(p, rise, storage);
        for (std::int64_t i = 0; i < inputs.v->elements(); ++i) inputs.v.ptr<double>()[i] *= static_cast<double>(value);
        expect_reference(p, inputs, storage, {p.tiles},
                         fmt::format("{}, values of {}, a rise of {}", name_of(storage), value, rise));
      }
    }
  }
}

TEST_P(CpuLateScores, BesideTermsBandsMergesAndPartsOfTheKeys) {
  const auto each = [](const Problem& p, const std::vector<std::vector<Tile>>& pieces, const std::string& what,
                       const std::function<void(const Inputs&)>& change = {}) {
    for (const DType storage : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Inputs inputs = inputs_that_rise(p, change ? 0 : 300, storage);
      if (change) change(inputs);
      expect_reference(p, inputs, storage, pieces, fmt::format("{}, {}", what, name_of(storage)));
    }
  };
  const Problem plain = late_problem(kKeys);
  Problem p = plain;
  p.bias = {1, kRows, 1, kKeys};
  each(p, {p.tiles}, "beside a bias");
  each(p, {p.tiles}, "of a bias", [](const Inputs& inputs) {
    for (std::int64_t row = 0; row < kRows; row += 3) inputs.bias->at<double>(0, row, 0, kLate) = 300;
  });
  p = plain;
  p.softcap = 512;
  p.slopes = {0.25};
  each(p, {p.tiles}, "under a softcap and slopes");
  p = plain;
  p.dropout = {0.25, 9, 1, 0, 1};
  each(p, {p.tiles}, "under dropout");
  p = plain;
  p.tiles = tiles_of(Mask::of_regions({{{0, 60}, {0, 300}}, {{0, 100}, {300, 700}, -kUnbounded, 540}}), kRows, kKeys);
  each(p, {p.tiles}, "in the second of two bands");
  std::vector<Tile> first, second;
  for (const Tile& tile : plain.tiles) {
    if (const auto part = restrict_to(tile, {0, kRows}, {0, 100})) first.push_back(*part);
    if (const auto part = restrict_to(tile, {0, kRows}, {100, kKeys})) second.push_back(*part);
  }
  each(plain, {first, second}, "of what is merged");
  each(plain, {second, first}, "of what is merged into");
  p = late_problem(2500);
  each(p, {p.tiles}, "in one of several parts of the keys");
  p.dropout = {0.25, 9, 1, 0, 1};
  each(p, {p.tiles}, "in one of several parts of the keys, under dropout");
}

DATTN_ON_EVERY_PATH(CpuLateScores);

}  // namespace
}  // namespace dattn
