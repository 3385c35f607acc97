// determinism: invariant gives the same bits on every mesh, layout and number of threads, repeatable on one mesh for any number
// of threads: out, lse, dq, dk and dv of one call, put together from the shards of the mesh, bit for bit.
#include <cstring>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/threads.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"
#include "tests/conformance/expected.h"
#include "tests/conformance/ranks.h"
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

// What this rank has of the whole, and zeros. The mesh's data ranks share the batch out.
Whole own_part(const Case& one, AttentionOptions options, Communicator& world) {
  const Mesh mesh(world, one.mesh);
  const AttentionShape& s = one.shape;
  const Interval batch = split_evenly(s.batch, one.mesh.size(Axis::kData), mesh.coordinate(Axis::kData));
  AttentionShape shape = s;
  shape.batch = batch.count();
  options.mask = batch_slice(options.mask, batch);
  ShardedAttention attention(mesh, shape, options);
  if (world.rank() == 0) {
    require_proved(attention.forward_plan(), "forward");
    require_proved(attention.backward_plan(), "backward");
  }
  const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
  const HeadRange heads = attention.heads();
  const Device device = current_device();
  const DeviceScope host(Device{});
  Case alone = one;
  alone.mesh = {};
  const auto inputs = expected(alone, 0);
  const ShardInputs in = shard_inputs(*inputs, s, batch, attention, device);
  AttentionResult result;
  AttentionGradients gradients;
  {
    const DeviceScope scope(device);
    result = attention.forward(in.q, in.k, in.v, in.call);
    gradients = attention.backward(in.q, in.k, in.v, result, in.dout, in.call);
  }
  bring_to_host(result, gradients);
  Whole whole;
  const auto add = [&](const char* name, const TensorView& shard, const Shape& all, const Positions& rows, Interval part) {
    const Tensor& into = whole.emplace(name, Tensor(shard.dtype, all)).first->second;
    place(shard, rows, part, into->slice(0, batch.begin, batch.count()));
  };
  add("out", result.out, {s.batch, s.seq_q, s.heads, s.dim_v}, q_rows, heads.q);
  add("lse", as_rows(result.lse), {s.batch, s.seq_q, s.heads, 1}, q_rows, heads.q);
  add("dq", gradients.dq, inputs->q->shape, q_rows, heads.q);
  add("dk", gradients.dk, inputs->k->shape, kv_rows, heads.kv);
  add("dv", gradients.dv, inputs->v->shape, kv_rows, heads.kv);
  return whole;
}

// The first rank's part becomes the whole, bit by bit: no two ranks have the same element.
void join(const Whole& part, Communicator& world) {
  for (const auto& [name, tensor] : part) {
    char* const own = tensor.ptr<char>();
    const auto size = static_cast<std::size_t>(tensor->bytes());
    const std::vector<std::string> parts = world.gather_strings({own, size}, {"conformance"});
    if (world.rank() != 0) continue;
    for (const std::string& other : parts) {
      for (std::size_t i = 0; i < size; ++i) own[i] = static_cast<char>(own[i] | other[i]);
    }
  }
}

// On the first rank; nothing elsewhere.
Whole run(Case one, const Sharding& setup, Determinism determinism = Determinism::kInvariant) {
  one.mesh = setup.mesh;
  one.layout = setup.layout;
  AttentionOptions options = options_of(one);
  options.determinism = determinism;
  Whole whole;
  run_ranks(setup.mesh.ranks(), [&](Communicator& world) {
    set_num_threads(setup.threads);
    Whole part = own_part(one, options, world);
    join(part, world);
    if (world.rank() == 0) whole = std::move(part);
  });
  return whole;
}

void expect_same_bits(const Whole& some, const Whole& wanted, const std::string& what) {
  for (const auto& [name, tensor] : wanted) {
    ASSERT_EQ(std::memcmp(some.at(name)->data, tensor->data, static_cast<std::size_t>(tensor->bytes())), 0)
        << name << " on " << what;
  }
}

// Smaller on a GPU, which may be a stand-in, and slow.
AttentionShape shape_of(DType dtype) {
  if (test_devices().device == DeviceChoice::kCuda) return {1, 131, 131, 4, 2, 8, 16, dtype};
  return {2, 301, 301, 4, 2, 24, 16, dtype};
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
  int ran = 0;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const std::string terms : {"none", "all"}) {
      AttentionShape shape = shape_of(dtype);
      if (terms == "none") shape.seq_kv -= 44;
      if (terms == "all") shape.bias = BiasShape{}, shape.sink = true;
      const Case one{"auto", {}, Layout::kZigzag, GetParam(), shape, terms};
      const Whole alone = run(one, {mesh_of(1, 1, 1, 1)});
      for (const Sharding& setup : setups) {
        if (setup.mesh.ranks() > most_ranks() || setup.mesh.size(Axis::kData) > shape.batch) continue;
        ++ran;
        expect_same_bits(run(one, setup), alone,
                         fmt::format("{}, layout {}, {} threads, {}, terms {}", setup.mesh.text(), name_of(setup.layout),
                                     setup.threads, name_of(dtype), terms));
      }
    }
  }
  RecordProperty("cases", ran);
}

class Repeatable : public testing::TestWithParam<std::string> {};

// Every strategy, on a mesh that it takes: again, and with another number of threads.
TEST_P(Repeatable, SameBitsEveryTimeForAnyNumberOfThreads) {
  const MeshShape meshes[] = {mesh_of(1, 2, 2, 1, 2), mesh_of(1, 2, 2, 1),       mesh_of(1, 4, 1, 1),
                              mesh_of(1, 1, 4, 1),    mesh_of(1, 2, 1, 1, 1, 2), mesh_of(1, 2, 1, 1),
                              mesh_of(1, 1, 2, 1),    mesh_of(1, 1, 1, 1, 2),    mesh_of(1, 1, 1, 1, 1, 2)};
  int ran = 0;
  for (const MeshShape& mesh : meshes) {
    if (mesh.ranks() > most_ranks()) continue;
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const Case one{GetParam(), {}, Layout::kZigzag, "documents_window", shape_of(dtype), "softcap"};
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
  RecordProperty("cases", ran);
}

// Strides beside the whole sequence, however long: of each region one tile.
TEST(InvariantStrides, LongOnesHaveTheSameBits) {
  if (most_ranks() < 3) GTEST_SKIP() << "it is of 3 ranks";
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
