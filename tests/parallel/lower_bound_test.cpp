// The communication lower bound: its reference points, and that no strategy goes below it.
#include "parallel/lower_bound.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "parallel/cost_model.h"
#include "parallel/strategy.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

AttentionShape shape_of(std::int64_t heads, std::int64_t kv_heads, std::int64_t seq = 131072) {
  return {1, seq, seq, heads, kv_heads, 128, 128, DType::kBF16};
}

// In elements of S D.
double bound(std::int64_t heads, std::int64_t kv_heads, int parts) {
  return lower_bound_elements(shape_of(heads, kv_heads), parts) / (131072.0 * 128);
}

TEST(LowerBound, ReferencePoints) {
  EXPECT_NEAR(bound(32, 8, 8), 7.88, 0.006);
  EXPECT_NEAR(bound(32, 8, 64), 2.65, 0.006);
  EXPECT_NEAR(bound(32, 8, 256), 1.37, 0.006);
  EXPECT_NEAR(bound(32, 8, 512), 0.98, 0.006);
  EXPECT_EQ(bound(32, 8, 1), 0);
}

// At most as many ranks as query heads share a KV head: all keys and no query, which is what a ring receives.
TEST(LowerBound, FewRanksReceiveTheKeys) {
  EXPECT_DOUBLE_EQ(bound(48, 4, 8), 2 * 4 * 7.0 / 8);
  EXPECT_DOUBLE_EQ(bound(32, 8, 4), 2 * 8 * 3.0 / 4);
}

TEST(LowerBound, BytesAreOfOneTensorCoordinate) {
  const AttentionShape shape = shape_of(32, 8);
  EXPECT_DOUBLE_EQ(lower_bound_bytes(shape, mesh_of(1, 4, 4, 2)), 2 * lower_bound_elements(shape_of(16, 4), 16));
}

RC_GTEST_PROP(LowerBound, NoStrategyReceivesLess, ()) {
  const std::int64_t group = *rc::gen::inRange(1, 9), kv_heads = *rc::gen::inRange(1, 17);
  const int ring = *rc::gen::inRange(1, 17), rows = *rc::gen::inRange(1, 9), outer = *rc::gen::inRange(1, 4);
  const int ulysses = *rc::gen::inRange(1, static_cast<int>(group * kv_heads) + 1);
  AttentionShape shape = shape_of(group * kv_heads, kv_heads, std::int64_t{ring} * rows * outer * ulysses * 8);
  shape.batch = *rc::gen::inRange(1, 4);
  const MeshShape mesh = mesh_of(1, ring, ulysses, 1, rows, outer);
  const double least = lower_bound_bytes(shape, mesh);
  AttentionOptions options;
  options.mask = Mask::full();
  const auto problem = make_problem(mesh, shape, options);
  for (const Strategy& strategy : strategies()) {
    if (!strategy.automatic || !strategy.accepts(*problem).ok) continue;
    const bool fetches = strategy.name == "fetch" || strategy.name == "halo";
    const auto transfers = transfers_of(strategy.name, shape, mesh, fetches ? seen_rows(*problem) : SeenRows{});
    RC_ASSERT(transfers.has_value());
    RC_ASSERT(bytes_of(transfers->forward) >= least * (1 - 1e-9));
  }
}

}  // namespace
}  // namespace dattn
