// What strategies ask of a problem, on small problems whose answer is plain.
#include "parallel/requirements.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "parallel/strategy.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

using testing::HasSubstr;

std::shared_ptr<const Problem> problem_of(const MeshShape& mesh, const Mask& mask, Layout layout = Layout::kContiguous) {
  AttentionOptions options;
  options.mask = mask;
  options.layout = layout;
  return make_problem(mesh, {.seq_q = 48, .seq_kv = 48, .heads = 6, .kv_heads = 3}, options);
}

TEST(Requirements, AxesOfRanksThatAStrategyHasNoUseFor) {
  const auto problem = problem_of(mesh_of(2, 3, 1, 2), Mask::full());
  EXPECT_TRUE(uses(*problem, "it", {Axis::kUlysses, Axis::kRing}).ok);  // data and tensor are no sequence axes
  EXPECT_EQ(uses(*problem, "it", {Axis::kUlysses}).why,
            "strategy it has no use for the 3 ranks of mesh.ring; use ring, or move them to mesh.ulysses");
}

// Six places of eight rows; place 3 has rows [24, 32), its neighbours [16, 24) and [32, 40).
TEST(Requirements, KeysBeyondTheNeighbours) {
  const auto beyond = [](const Mask& mask, int place) {
    return keys_beyond_neighbours(*problem_of(mesh_of(1, 6, 1, 1), mask), place);
  };
  EXPECT_EQ(beyond(Mask::window(8, 8), 3), 0);
  EXPECT_EQ(beyond(Mask::window(10, 8), 3), 2);
  EXPECT_EQ(beyond(Mask::window(10, 11), 3), 5);
  EXPECT_EQ(beyond(Mask::causal(), 3), 16);
  EXPECT_EQ(beyond(Mask::causal(), 1), 0);
  EXPECT_EQ(beyond(Mask::full(), 0), 24);  // place 0's neighbours are 1 and, around the ring, 5
}

TEST(Requirements, NeighboursAreCountedAfterUlysses) {
  // Four ring places of twelve rows, each on two ranks.
  const auto problem = problem_of(mesh_of(1, 4, 2, 1), Mask::window(12, 0));
  for (int place = 0; place < 4; ++place) EXPECT_EQ(keys_beyond_neighbours(*problem, place), 0) << place;
  EXPECT_EQ(keys_beyond_neighbours(*problem_of(mesh_of(1, 4, 2, 1), Mask::window(13, 0)), 2), 1);
}

TEST(Requirements, SeesNeighboursOnly) {
  EXPECT_TRUE(sees_neighbours_only(*problem_of(mesh_of(1, 3, 1, 1), Mask::full()), "it").ok);
  EXPECT_TRUE(sees_neighbours_only(*problem_of(mesh_of(1, 6, 1, 1), Mask::window(8, 0)), "it").ok);
  EXPECT_THAT(
      sees_neighbours_only(*problem_of(mesh_of(1, 6, 1, 1), Mask::window(9, 0)), "it").why,
      HasSubstr("strategy it: with mask window(left 9, right 0) and layout contiguous the queries of rank 2 see 1 keys"));
  EXPECT_FALSE(sees_neighbours_only(*problem_of(mesh_of(1, 6, 1, 1), Mask::window(9, 0), Layout::kStriped), "it").ok);
}

TEST(Requirements, HeadGroupsStayWhole) {
  EXPECT_TRUE(keeps_head_groups(*problem_of(mesh_of(1, 2, 1, 3), Mask::full()), "it").ok);
  EXPECT_THAT(keeps_head_groups(*problem_of(mesh_of(1, 1, 1, 2), Mask::full()), "it").why,
              HasSubstr("it: mesh.tensor 2 cuts through a group of 2 query heads"));
}

}  // namespace
}  // namespace dattn
