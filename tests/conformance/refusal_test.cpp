// Everything that is refused is refused on all ranks alike, before any of them has started a message.
#include <cmath>
#include <functional>
#include <numeric>
#include <regex>
#include <set>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "launch/commands/planning.h"
#include "parallel/comm/decorators.h"
#include "tests/conformance/ranks.h"

namespace dattn::conformance {
namespace {

constexpr int kRanks = 4;
constexpr std::int64_t kFar = std::int64_t{1} << 41;  // beyond every position

// A call of ring 2 x ulysses 2; what is bad about it is changed.
struct Call {
  MeshShape mesh = [] {
    MeshShape grid;
    grid.set(Axis::kRing, 2);
    grid.set(Axis::kUlysses, 2);
    return grid;
  }();
  AttentionShape shape{.batch = 2, .seq_q = 64, .seq_kv = 64, .heads = 8, .kv_heads = 4, .dim_qk = 16, .dim_v = 16};
  AttentionOptions options;
};

struct Bad {
  std::string expected;  // in the text of the error
  std::function<void(Communicator& world)> run;
};

// Planning the changed call is refused.
Bad planned(const std::string& expected, const std::function<void(Call&)>& change) {
  return {expected, [change](Communicator& world) {
            Call call;
            change(call);
            const Mesh mesh(world, call.mesh);
            ShardedAttention(mesh, call.shape, call.options);
          }};
}

Bad masked(const std::string& expected, const Mask& mask) {
  return planned(expected, [mask](Call& call) { call.options.mask = mask; });
}

// The tensors of a rank's shard, which a call changes before it is made.
struct Tensors {
  Tensor q, k, v, dout, out, lse, bias = {};
  AttentionCall call = {};
};

Bad called(
    const std::string& expected, bool backward, const std::function<void(Tensors&)>& change,
    const std::function<void(Call&)>& plan = [](Call&) {}) {
  return {expected, [=](Communicator& world) {
            Call c;
            plan(c);
            const Mesh mesh(world, c.mesh);
            ShardedAttention attention(mesh, c.shape, c.options);
            const std::int64_t rows = attention.q_positions().count(), keys = attention.kv_positions().count();
            const Shape queries{c.shape.batch, rows, c.shape.heads, c.shape.dim_qk};
            Tensors t{.q = Tensor(DType::kF32, queries),
                      .k = Tensor(DType::kF32, {c.shape.batch, keys, c.shape.kv_heads, c.shape.dim_qk}),
                      .v = Tensor(DType::kF32, {c.shape.batch, keys, c.shape.kv_heads, c.shape.dim_v}),
                      .dout = Tensor(DType::kF32, queries),
                      .out = Tensor(DType::kF32, queries),
                      .lse = Tensor(DType::kF32, {c.shape.batch, c.shape.heads, rows})};
            change(t);
            if (backward)
              attention.backward(t.q, t.k, t.v, AttentionResultView(t.out, t.lse), t.dout, t.call);
            else
              attention.forward(t.q, t.k, t.v, t.call);
          }};
}

// A config, resolved and planned as the command does it.
Bad configured(const std::string& expected, const std::string& text) {
  return {expected, [text](Communicator& world) {
            const auto config = parse_config_as<RunConfig>(text, "bad.yaml");
            const AttentionShape shape = planned_shape(config);
            const RunConfig resolved = resolve_mesh(config, shape);
            const Mesh mesh(world, resolved.mesh.shape());
            ShardedAttention(mesh, shape, attention_options(resolved, shape.seq_q, shape.seq_kv));
          }};
}

const double kNan = std::nan("");

// Contradictory options, and strategies that do not suit the mesh or the mask.
std::vector<Bad> contradictions() {
  return {
      planned("unknown strategy 'rings'; known: ", [](Call& c) { c.options.strategy = "rings"; }),
      planned("strategy ring has no use for the 2 ranks of mesh.ulysses; use hybrid",
              [](Call& c) { c.options.strategy = "ring"; }),
      planned("strategy ulysses has no use for the 2 ranks of mesh.ring", [](Call& c) { c.options.strategy = "ulysses"; }),
      planned("beyond its neighbours on the ring axis; use fetch",
              [](Call& c) {
                c.mesh = MeshShape{};
                c.mesh.set(Axis::kRing, 4);
                c.options.strategy = "halo";
              }),
      planned(
          "mesh.tensor 4 cuts through a group of 8 query heads, whose gradients would be added in another order; use at most 1",
          [](Call& c) {
            c.mesh = MeshShape{};
            c.mesh.set(Axis::kTensor, 4);
            c.shape.kv_heads = 1;
            c.options.determinism = Determinism::kInvariant;
          }),
      planned("has 6 ranks but the job has 4; start 6 ranks or change the mesh", [](Call& c) { c.mesh.set(Axis::kRing, 3); }),
      planned("mesh.ring is 0; use a size from 1", [](Call& c) { c.mesh.set(Axis::kRing, 0); }),
      configured("mesh.ranks", "mesh: {ranks: 4, ring: 2}\nshape: {seq: 64, heads: 8, dim: 16}\n"),
      configured("mesh.ranks", "mesh: {ranks: 4, data: 3}\nshape: {seq: 64, heads: 8, dim: 16}\n"),
      configured("needs the machine", "mesh: {ranks: 4}\nobjective: time\nshape: {seq: 64, heads: 8, dim: 16}\n"),
      configured("no plan for 4 ranks with strategy halo and layout any is left",
                 "mesh: {ranks: 4}\nstrategy: halo\nattention: {mask: {kind: full}}\nshape: {seq: 64, heads: 1, dim: 16}\n"),
      configured("attention.mask.length", "mesh: {ring: 4}\nattention: {mask: {kind: causal, length: 3}}\nshape: {seq: 64}\n"),
      configured("attention.mask.window is missing",
                 "mesh: {ring: 4}\nattention: {mask: {kind: global, tokens: 3}}\nshape: {seq: 64}\n"),
      configured("ends at 65 but the sequence has 64 positions",
                 "mesh: {ring: 4}\nattention: {mask: {kind: documents, cu_seqlens: [0, 65]}}\nshape: {seq: 64}\n"),
  };
}

std::vector<Bad> bad_masks() {
  Mask prefix_with_end = Mask::prefix(3);
  prefix_with_end.align = Mask::Align::kEnd;
  return {
      masked("mask window has left -2", Mask::window(-2, 0)),
      masked("cu_seqlens[2] = 3 is less than cu_seqlens[1] = 5; sort them", Mask::documents({0, 5, 3}, Mask::causal())),
      masked("start at 0", Mask::documents({2, 64}, Mask::causal())),
      masked("end it at 64 or before", Mask::documents({0, 65}, Mask::causal())),
      masked("cu_seqlens_kv ends at 65 but there are 64 keys", Mask::documents({0, 64}, Mask::causal(), {0, 65})),
      masked("give both the same number of documents", Mask::documents({0, 9, 64}, Mask::causal(), {0, 64})),
      masked("is no band", Mask::documents({0, 64}, Mask::prefix(3))),
      masked("mask prefix has length 65 but there are 64 keys; use 0 to 64", Mask::prefix(65)),
      masked("mask global has tokens 65 but the sequence has 64 positions; use 0 to 64", Mask::global(65, 3, 3)),
      masked("mask global has left -3", Mask::global(1, -3, 3)),
      masked("use [0, 0] to [3, 3]", Mask::blocks(16, {{0, 0}, {4, 0}})),
      masked("mask blocks lists [1, 0] twice", Mask::blocks(16, {{1, 0}, {1, 0}})),
      masked("mask blocks has size 0", Mask::blocks(0, {})),
      masked("mask region 0 has k [0, 65] but the keys are [0, 64]; write 0 <= begin <= end <= 64",
             Mask::of_regions({{{0, 64}, {0, 65}}})),
      masked("overlap, first at query 4; make them disjoint", Mask::of_regions({{{0, 9}, {0, 9}}, {{4, 8}, {0, 3}}})),
      masked("lengths[1] = 65 but the sequence has 64 positions; use 0 to 64", Mask::padding({64, 65})),
      masked("has 3 entries but the batch has 2 rows; give one for each row", Mask::padding({1, 2, 3})),
      masked("has 1 entries but the batch has 2 rows", Mask::per_row({Mask::full()})),
      masked("mask prefix has length 65", Mask::per_row({Mask::full(), Mask::prefix(65)})),
      masked("mask kind 'prefix' has no align", prefix_with_end),
  };
}

std::vector<Bad> bad_sizes() {
  const auto shaped = [](const std::string& expected, const std::function<void(AttentionShape&)>& change) {
    return planned(expected, [change](Call& call) { change(call.shape); });
  };
  return {
      shaped("seq_q -1", [](AttentionShape& s) { s.seq_q = -1; }),
      shaped("batch -1", [](AttentionShape& s) { s.batch = -1; }),
      shaped("heads 0 and kv_heads 4 must be at least 1", [](AttentionShape& s) { s.heads = 0; }),
      shaped("query heads 9 are no multiple of KV heads 4; use a multiple, for example 12",
             [](AttentionShape& s) { s.heads = 9; }),
      shaped("attention head dim 257 is outside 1..256", [](AttentionShape& s) { s.dim_qk = 257; }),
      shaped("attention head dim 0 is outside 1..256", [](AttentionShape& s) { s.dim_v = 0; }),
      shaped("use fp32, bf16, fp16 or fp64", [](AttentionShape& s) { s.dtype = DType::kI32; }),
      shaped("must lie in [0,", [](AttentionShape& s) { s.batch = 0, s.seq_q = kFar, s.seq_kv = 1; }),
      shaped("are more than 2^62 pairs", [](AttentionShape& s) { s.batch = 1, s.seq_q = s.seq_kv = std::int64_t{1} << 32; }),
      shaped("are more than 2^50 numbers", [](AttentionShape& s) { s.batch = 1 << 22, s.seq_q = 1, s.seq_kv = 1 << 30; }),
      planned("attention dropout has room for",
              [](Call& c) { c.options.dropout = 0.1, c.shape.seq_q = 1, c.shape.seq_kv = std::int64_t{1} << 32; }),
  };
}

std::vector<Bad> bad_terms() {
  const auto with = [](const std::string& expected, const std::function<void(AttentionOptions&)>& change) {
    return planned(expected, [change](Call& call) { change(call.options); });
  };
  return {
      with("attention.softcap is -1", [](AttentionOptions& o) { o.softcap = -1; }),
      with("attention.softcap is nan", [](AttentionOptions& o) { o.softcap = kNan; }),
      with("attention.softcap is 1e+300; use a number from 1e-30 to 1e+30", [](AttentionOptions& o) { o.softcap = 1e300; }),
      with("attention.softmax_scale is inf; use a number of at most 1e+30",
           [](AttentionOptions& o) { o.softmax_scale = HUGE_VAL; }),
      with("attention.alibi_slopes holds 1e+300; with ", [](AttentionOptions& o) { o.alibi_slopes.assign(8, 1e300); }),
      with("attention.dropout.p is 1; it must lie in [0, 1)", [](AttentionOptions& o) { o.dropout = 1; }),
      with("attention.alibi_slopes has 3 entries for 8 query heads",
           [](AttentionOptions& o) {
             o.alibi_slopes = {1, 2, 3};
           }),
      with("attention.alibi_slopes holds nan", [](AttentionOptions& o) { o.alibi_slopes.assign(8, kNan); }),
  };
}

// What single calls bring.
std::vector<Bad> bad_tensors() {
  const auto with_bias = [](Call& c) { c.shape.bias = BiasShape{}; };
  const auto with_sink = [](Call& c) { c.shape.sink = true; };
  return {
      called("attention: k has shape [2, 16, 4, 8] but this rank's shard is [2, 16, 4, 16]", false,
             [](Tensors& t) {
               t.k = Tensor(DType::kF32, {2, 16, 4, 8});
             }),
      called("attention: q has dtype bf16 but the plan was made for fp32", false,
             [](Tensors& t) { t.q = to_dtype(t.q, DType::kBF16); }),
      called(
          "the plan was made for a bias, the call brings none", false, [](Tensors&) {}, with_bias),
      called(
          "attention: bias has shape [2, 16, 8, 63] but this rank's shard is [2, 16, 8, 64]", false,
          [](Tensors& t) {
            t.bias = Tensor(DType::kF32, {2, 16, 8, 63});
            t.call.bias = t.bias;
          },
          with_bias),
      called("the plan was made without sink, the call brings one", false,
             [](Tensors& t) {
               t.bias = Tensor(DType::kF32, {8});
               t.call.sink = t.bias;
             }),
      called(
          "attention: sink is fp32 [7]; it is fp32 [8]", false,
          [](Tensors& t) {
            t.bias = Tensor(DType::kF32, {7});
            t.call.sink = t.bias;
          },
          with_sink),
      called("attention: dout has shape", true,
             [](Tensors& t) {
               t.dout = Tensor(DType::kF32, {2, 16, 8, 15});
             }),
      called("attention: lse is fp32 [2, 8, 15]; it is contiguous fp32 [2, 8, 16]", true,
             [](Tensors& t) {
               t.lse = Tensor(DType::kF32, {2, 8, 15});
             }),
  };
}

struct Outcome {                   // on the first rank
  std::vector<std::string> texts;  // of the ranks' errors; empty: none
  std::int64_t messages = 0;       // that any rank started
};

Outcome run(const std::function<void(Communicator&)>& body) {
  Outcome outcome;
  run_ranks(kRanks, [&](Communicator& world) {
    std::vector<int> everyone(kRanks);
    std::iota(everyone.begin(), everyone.end(), 0);
    const auto counter = std::make_shared<ByteCounter>();
    const auto counting = counted(world.split(everyone, "refusal"), counter);
    std::string text;
    try {
      body(*counting);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kBadInput) << error.what();
      text = std::regex_replace(error.what(), std::regex("\\brank [0-9]+"), "rank #");
    }
    const std::vector<std::string> texts = world.gather_strings(text, {"refusal"}),
                                   started = world.gather_strings(std::to_string(counter->total().operations), {"refusal"});
    if (world.rank() != 0) return;
    outcome.texts = texts;
    for (const std::string& messages : started) outcome.messages += std::stoll(messages);
  });
  return outcome;
}

class Refusal : public testing::Test {
 protected:
  void SetUp() override {
    if (most_ranks() < kRanks) GTEST_SKIP() << "its calls are of " << kRanks << " ranks";
  }
};

void expect_refused(const std::vector<Bad>& all) {
  for (const Bad& bad : all) {
    SCOPED_TRACE(bad.expected);
    const Outcome outcome = run(bad.run);
    EXPECT_THAT(outcome.texts, testing::Each(testing::HasSubstr(bad.expected)));
    EXPECT_LE(std::set(outcome.texts.begin(), outcome.texts.end()).size(), 1u) << "the ranks say different things";
    EXPECT_EQ(outcome.messages, 0);
  }
  testing::Test::RecordProperty("cases", static_cast<int>(all.size()));
}

TEST_F(Refusal, Contradictions) { expect_refused(contradictions()); }
TEST_F(Refusal, Masks) { expect_refused(bad_masks()); }
TEST_F(Refusal, Sizes) { expect_refused(bad_sizes()); }
TEST_F(Refusal, Terms) { expect_refused(bad_terms()); }
TEST_F(Refusal, Tensors) { expect_refused(bad_tensors()); }

// The counter counts: the same call, with nothing bad about it.
TEST_F(Refusal, GoodCallsStartMessages) {
  for (const bool backward : {false, true}) {
    const Outcome outcome = run(called("", backward, [](Tensors&) {}).run);
    EXPECT_THAT(outcome.texts, testing::Each(""));
    if (outcome.texts.empty()) continue;
    EXPECT_GE(outcome.messages, kRanks * 3);
  }
}

}  // namespace
}  // namespace dattn::conformance
