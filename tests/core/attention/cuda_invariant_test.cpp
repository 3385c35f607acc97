// Invariant mode of the cuda kernel: the bits of a row do not depend on which other rows are in the call.
#include "tests/core/attention/invariant_rows.h"
#include "tests/core/attention/on_cuda.h"

namespace dattn {
namespace {

using namespace testing;  // NOLINT: the helpers of this folder

class CudaInvariant : public OnCuda {};

constexpr std::int64_t kSeq = 213;

InvariantCase make_case(const std::string& name, const Mask& mask) { return invariant_case(name, mask, kSeq, 2, 1, 24, 40); }

InvariantRows rows_here() { return {cuda_kernel(), kCuda}; }

std::vector<InvariantCase> cases() {
  std::vector<InvariantCase> all;
  all.push_back(make_case("causal", Mask::causal()));
  all.push_back(make_case("window of both sides", Mask::window(7, 101)));
  all.push_back(make_case("window narrower than steps", Mask::window(1, 0)));
  all.push_back(make_case("documents", Mask::documents({0, 1, 90, 141, 142, 213}, Mask::causal())));
  // Regions of which rows see several, the later ones in memory first; sinks, a window, stretches far away.
  all.push_back(make_case("regions", Mask::of_regions({{{100, 200}, {180, 210}, -kUnbounded, 60},
                                                       {{40, 200}, {0, 9}},
                                                       {{0, 213}, {9, 170}, -60, 0},
                                                       {{100, 150}, {9, 70}, -kUnbounded, -61}})));
  InvariantCase terms = make_case("causal with terms", Mask::causal());
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

TEST_F(CudaInvariant, RowsHaveTheSameBitsInEveryShard) {
  for (const InvariantCase& c : cases()) {
    for (const auto& [storage, tf32] : kPrecisions) {
      const Tf32Allowed allowed(tf32);
      rows_here().expect_same(c, storage, shards());
    }
  }
}

TEST_F(CudaInvariant, IsStillAttention) {
  for (const InvariantCase& c : cases()) check_cuda(c.p, c.name);
}

TEST_F(CudaInvariant, HeadsOfAGroupAddUpOneByOne) {
  for (const auto& [storage, tf32] : kPrecisions) {
    const Tf32Allowed allowed(tf32);
    rows_here().expect_heads_add_up(make_case("heads", Mask::causal()), storage);
  }
}

}  // namespace
}  // namespace dattn
