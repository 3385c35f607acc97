// determinism: invariant gives the same bits on every mesh, layout and number of threads, repeatable on one mesh for any number
// of threads: out, lse, dq, dk and dv of one call, put together from the shards of the mesh, bit for bit.
#include <cstring>
#include <map>
#include <mutex>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/threads.h"
#include "parallel/comm/thread.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/expected.h"
#include "tests/parallel/mesh_of.h"

namespace dattn::conformance {
namespace {

// Copies a shard [B, rows, heads, X] to its place in the whole.
void place(const TensorView& shard, const Positions& rows, Interval heads, const TensorView& whole) {
  const std::vector<std::int64_t> list = rows.list();
  for (std::size_t row = 0; row < list.size(); ++row) {
    copy(shard.slice(1, static_cast<std::int64_t>(row), 1), whole.slice(1, list[row], 1).slice(2, heads.begin, heads.count()));
  }
}

struct Sharding {
  MeshShape mesh;
  Layout layout = Layout::kZigzag;
  int threads = 1;
};

using Whole = std::map<std::string, Tensor>;

Whole run(Case one, const Sharding& setup, Determinism determinism = Determinism::kInvariant) {
  one.mesh = setup.mesh;
  one.layout = setup.layout;
  AttentionOptions options = options_of(one);
  options.determinism = determinism;
  Case alone = one;
  alone.mesh = {};
  const auto inputs = expected(alone, 0);
  const AttentionShape& s = one.shape;
  const DType sums = accumulate_type(s.dtype);
  Whole whole;
  whole.emplace("out", Tensor(s.dtype, {s.batch, s.seq_q, s.heads, s.dim_v}));
  whole.emplace("lse", Tensor(sums, {s.batch, s.seq_q, s.heads, 1}));
  whole.emplace("dq", Tensor(sums, inputs->q->shape));
  whole.emplace("dk", Tensor(sums, inputs->k->shape));
  whole.emplace("dv", Tensor(sums, inputs->v->shape));
  std::mutex mutex;
  run_thread_ranks(setup.mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(setup.threads);
    const Mesh mesh(world, setup.mesh);
    const Interval batch = split_evenly(s.batch, setup.mesh.size(Axis::kData), mesh.coordinate(Axis::kData));
    const auto mine = [&](const TensorView& all) { return all.slice(0, batch.begin, batch.count()); };
    AttentionShape shape = s;
    shape.batch = batch.count();
    AttentionOptions own_options = options;
    own_options.mask = batch_slice(options.mask, batch);
    ShardedAttention attention(mesh, shape, own_options);
    if (world.rank() == 0) {
      require_proved(attention.forward_plan(), "forward");
      require_proved(attention.backward_plan(), "backward");
    }
    const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
    const HeadRange heads = attention.heads();
    const Tensor q = shard_of(mine(inputs->q), q_rows, heads.q), k = shard_of(mine(inputs->k), kv_rows, heads.kv),
                 v = shard_of(mine(inputs->v), kv_rows, heads.kv), dout = shard_of(mine(inputs->dout), q_rows, heads.q);
    AttentionCall call{.dropout_stream = kDropoutStream, .batch_begin = batch.begin};
    Tensor bias;
    if (s.bias) {
      bias = bias_shard_of(mine(inputs->bias), q_rows, heads.q);
      call.bias = bias;
    }
    if (s.sink) call.sink = inputs->sink->slice(0, heads.q.begin, heads.q.count());
    const AttentionResult result = attention.forward(q, k, v, call);
    const AttentionGradients gradients = attention.backward(q, k, v, result, dout, call);
    TensorView lse = result.lse->transpose(1, 2);
    lse.shape = Shape{lse.size(0), lse.size(1), lse.size(2), 1};
    lse.strides[3] = 1;
    const std::lock_guard lock(mutex);
    place(result.out, q_rows, heads.q, mine(whole.at("out")));
    place(lse, q_rows, heads.q, mine(whole.at("lse")));
    place(gradients.dq, q_rows, heads.q, mine(whole.at("dq")));
    place(gradients.dk, kv_rows, heads.kv, mine(whole.at("dk")));
    place(gradients.dv, kv_rows, heads.kv, mine(whole.at("dv")));
  });
  return whole;
}

void expect_same_bits(const Whole& some, const Whole& wanted, const std::string& what) {
  for (const auto& [name, tensor] : wanted) {
    ASSERT_EQ(std::memcmp(some.at(name)->data, tensor->data, static_cast<std::size_t>(tensor->bytes())), 0)
        << name << " on " << what;
  }
}

class Invariant : public testing::TestWithParam<const char*> {};

TEST_P(Invariant, SameBitsOnEveryMeshLayoutAndThreadCount) {
  const std::vector<Sharding> setups{{mesh_of(1, 2, 1, 1)},
                                     {mesh_of(1, 3, 1, 1), Layout::kStriped},
                                     {mesh_of(1, 2, 2, 1), Layout::kContiguous},
                                     {mesh_of(1, 1, 4, 1), Layout::kBalanced, 2},
                                     {mesh_of(1, 2, 1, 2), Layout::kStriped, 2},
                                     {mesh_of(1, 2, 2, 1, 2), Layout::kZigzag},
                                     {mesh_of(1, 1, 1, 2), Layout::kZigzag, 2},
                                     {mesh_of(2, 2, 2, 1), Layout::kBalanced},
                                     {mesh_of(1, 4, 2, 1), Layout::kZigzag}};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const std::string terms : {"none", "all"}) {
      AttentionShape shape{2, 301, 301, 4, 2, 24, 16, dtype};
      if (terms == "none") shape.seq_kv = 257;
      if (terms == "all") shape.bias = BiasShape{}, shape.sink = true;
      const Case one{"auto", {}, Layout::kZigzag, GetParam(), shape, terms};
      const Whole alone = run(one, {mesh_of(1, 1, 1, 1)});
      for (const Sharding& setup : setups) {
        expect_same_bits(run(one, setup), alone,
                         fmt::format("{}, layout {}, {} threads, {}, terms {}", setup.mesh.text(), name_of(setup.layout),
                                     setup.threads, name_of(dtype), terms));
      }
    }
  }
}

class Repeatable : public testing::TestWithParam<std::string> {};

// Every strategy, on a mesh that it takes: again, and with another number of threads.
TEST_P(Repeatable, SameBitsEveryTimeForAnyNumberOfThreads) {
  const MeshShape meshes[] = {mesh_of(1, 2, 2, 1, 2), mesh_of(1, 2, 2, 1), mesh_of(1, 4, 1, 1), mesh_of(1, 1, 4, 1),
                              mesh_of(1, 2, 1, 1, 1, 2)};
  int ran = 0;
  for (const MeshShape& mesh : meshes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const Case one{GetParam(), {}, Layout::kZigzag, "documents_window", {2, 301, 301, 4, 2, 24, 16, dtype}, "softcap"};
      if (!find_strategy(GetParam()).accepts(*make_problem(mesh, one.shape, options_of(one))).ok) continue;
      ++ran;
      const Whole first = run(one, {mesh}, Determinism::kRepeatable);
      for (const int threads : {1, 2, 3}) {
        expect_same_bits(run(one, {mesh, one.layout, threads}, Determinism::kRepeatable), first,
                         fmt::format("{}, {} threads, {}", mesh.text(), threads, name_of(dtype)));
      }
    }
  }
  EXPECT_GT(ran, 0);
}

// Strides beside the whole sequence, however long: of each region one tile.
TEST(InvariantStrides, LongOnesHaveTheSameBits) {
  constexpr std::int64_t kSeq = 70'001;
  for (const char* mask : {"window", "window_right"}) {
    const Case one{"auto", {}, Layout::kStriped, mask, {1, kSeq, kSeq, 1, 1, 8, 8, DType::kF32}, "none"};
    const Whole alone = run(one, {mesh_of(1, 1, 1, 1)});
    expect_same_bits(run(one, {mesh_of(1, 3, 1, 1), Layout::kStriped}), alone, mask);
  }
}

INSTANTIATE_TEST_SUITE_P(Masks, Invariant,
                         testing::Values("full", "causal", "causal_bottom_right", "window", "window_right", "documents",
                                         "documents_end", "prefix", "regions", "global", "padding", "blocks", "per_row"),
                         [](const auto& mask) { return std::string(mask.param); });

std::vector<std::string> repeatable_strategies() {
  std::vector<std::string> names;
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Strategies, Repeatable, testing::ValuesIn(repeatable_strategies()),
                         [](const auto& strategy) { return strategy.param; });

}  // namespace
}  // namespace dattn::conformance
