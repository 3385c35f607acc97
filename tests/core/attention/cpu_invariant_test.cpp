// Invariant mode: the bits of a row do not depend on which other rows are in the call, on every instruction set here.
#include "tests/core/attention/invariant_rows.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CpuInvariant : public EveryPath {};

constexpr std::int64_t kSeq = 613;  // three forward key blocks, four backward ones

InvariantCase make_case(const std::string& name, const Mask& mask) { return invariant_case(name, mask, kSeq, 4, 2, 20, 36); }

InvariantRows rows_here() { return {cpu_kernel(), Device{}}; }

std::vector<InvariantCase> cases() {
  std::vector<InvariantCase> all;
  all.push_back(make_case("full", Mask::full()));
  all.push_back(make_case("causal", Mask::causal()));
  all.push_back(make_case("window", Mask::window(130, 0)));
  all.push_back(make_case("window of both sides", Mask::window(7, 201)));
  all.push_back(make_case("window narrower than steps", Mask::window(2, 1)));
  all.push_back(make_case("documents", Mask::documents({0, 1, 90, 301, 302, 613}, Mask::causal())));
  // Regions of which rows see several, the later ones in memory first; sinks, a window, stretches far away.
  all.push_back(make_case("regions", Mask::of_regions({{{100, 600}, {500, 610}, -kUnbounded, 200},
                                                       {{40, 600}, {0, 9}},
                                                       {{0, 613}, {9, 480}, -60, 0},
                                                       {{200, 500}, {9, 200}, -kUnbounded, -61}})));
  InvariantCase terms = make_case("causal with terms", Mask::causal());
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

TEST_P(CpuInvariant, RowsHaveTheSameBitsInEveryShard) {
  for (const InvariantCase& c : cases()) {
    for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) rows_here().expect_same(c, storage, shards());
  }
}

TEST_P(CpuInvariant, IsStillAttention) {
  for (const InvariantCase& c : cases()) check(c.p, c.name);
}

TEST_P(CpuInvariant, ThreadsDoNotChangeABit) {
  for (const InvariantCase& c : cases()) {
    const InvariantRows::Whole one = rows_here().run_whole(c.p, DType::kF32);
    set_num_threads(2);
    const InvariantRows::Whole two = rows_here().run_whole(c.p, DType::kF32);
    EXPECT_TRUE(same_bits(one.results.out, two.results.out) && same_bits(one.results.dq, two.results.dq)) << c.name;
    EXPECT_TRUE(same_bits(one.results.dk, two.results.dk) && same_bits(one.results.dv, two.results.dv)) << c.name;
    set_num_threads(1);
  }
}

TEST_P(CpuInvariant, HeadsOfAGroupAddUpOneByOne) {
  for (const DType storage : {DType::kF32, DType::kBF16, DType::kF16}) {
    rows_here().expect_heads_add_up(make_case("heads", Mask::causal()), storage);
  }
}

DATTN_ON_EVERY_PATH(CpuInvariant);

}  // namespace
}  // namespace dattn
