// Attention through the C interface: the same numbers on every mesh and communicator, forward and backward, with all terms.
#include <mutex>

#include "tests/plugins/c/callback_host.h"
#include "tests/plugins/c/fixture.h"

namespace dattn::test {
namespace {

constexpr std::int64_t kBatch = 2, kSeq = 61, kHeads = 4, kKvHeads = 2, kDim = 16;
constexpr const char* kAttention =
    R"({"mask": {"kind": "window", "left": 40, "right": 5}, "softcap": 20, "alibi_slopes": [0.1, 0.2, 0.05, 0.0],)"
    R"( "dropout": {"p": 0.1, "seed": 7}})";

struct Whole {
  HostTensor q = HostTensor::random({kBatch, kSeq, kHeads, kDim}, 1), k = HostTensor::random({kBatch, kSeq, kKvHeads, kDim}, 2);
  HostTensor v = HostTensor::random({kBatch, kSeq, kKvHeads, kDim}, 3),
             dout = HostTensor::random({kBatch, kSeq, kHeads, kDim}, 4);
  HostTensor bias = HostTensor::random({1, kSeq, kHeads, kSeq}, 5), sink = HostTensor::random({kHeads}, 6);
  const char *strategy = nullptr, *determinism = nullptr;
};

struct Results {
  HostTensor out{{kBatch, kSeq, kHeads, kDim}}, lse{{kBatch, kHeads, kSeq}};
  HostTensor dq{{kBatch, kSeq, kHeads, kDim}}, dk{{kBatch, kSeq, kKvHeads, kDim}}, dv{{kBatch, kSeq, kKvHeads, kDim}};
  HostTensor dbias{{1, kSeq, kHeads, kSeq}}, dsink{{kHeads}};
};

dattn_attention_options options_of_call() {
  auto options = sized<dattn_attention_options>();
  options.batch = kBatch;
  options.seq_q = kSeq;
  options.heads = kHeads;
  options.kv_heads = kKvHeads;
  options.dim_qk = kDim;
  options.dtype = kFp32;
  options.attention = kAttention;
  options.bias = DATTN_BIAS | DATTN_BIAS_PER_HEAD;
  options.sink = 1;
  return options;
}

HostTensor shard(dattn_sharding* sharding, const HostTensor& whole, int axis) {
  std::vector<std::int64_t> shape = whole.shape;
  shape[static_cast<std::size_t>(axis)] = dattn_sharding_rows(sharding);
  HostTensor mine(shape);
  EXPECT_EQ(dattn_shard(sharding, axis, &whole, &mine, nullptr), DATTN_OK) << dattn_last_error();
  return mine;
}

// One rank: its shards of the whole tensors in, whole results out (gathered; every rank has them).
void attend(dattn_comm* comm, dattn_mesh_options axes, const Whole& whole, Results& results, std::mutex& results_mutex) {
  axes.struct_size = sizeof axes;
  MeshHandle mesh;
  PlanHandle plan;
  ShardingHandle rows;
  DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
  dattn_attention_options options = options_of_call();
  options.strategy = whole.strategy, options.determinism = whole.determinism;
  DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));
  DATTN_OK_OR_FAIL(dattn_plan_verify(plan));
  DATTN_OK_OR_FAIL(dattn_sharding_create(mesh, kSeq, nullptr, nullptr, &rows));
  const std::int64_t mine = dattn_sharding_rows(rows);

  const HostTensor q = shard(rows, whole.q, 1), k = shard(rows, whole.k, 1), v = shard(rows, whole.v, 1);
  const HostTensor dout = shard(rows, whole.dout, 1), bias = shard(rows, whole.bias, 1);
  HostTensor out({kBatch, mine, kHeads, kDim}), lse({kBatch, kHeads, mine}), dq({kBatch, mine, kHeads, kDim});
  HostTensor dk({kBatch, mine, kKvHeads, kDim}), dv({kBatch, mine, kKvHeads, kDim}), dbias({1, mine, kHeads, kSeq});
  HostTensor dsink({kHeads});

  auto forward = sized<dattn_forward>();
  forward.q = &q, forward.k = &k, forward.v = &v, forward.bias = &bias, forward.sink = &whole.sink;
  forward.out = &out, forward.lse = &lse;
  forward.dropout_stream = 3;
  DATTN_OK_OR_FAIL(dattn_attention_forward(plan, &forward));
  auto backward = sized<dattn_backward>();
  backward.q = &q, backward.k = &k, backward.v = &v, backward.bias = &bias, backward.sink = &whole.sink;
  backward.out = &out, backward.lse = &lse, backward.dout = &dout;
  backward.dq = &dq, backward.dk = &dk, backward.dv = &dv, backward.dbias = &dbias, backward.dsink = &dsink;
  backward.dropout_stream = 3;
  DATTN_OK_OR_FAIL(dattn_attention_backward(plan, &backward));

  Results gathered;
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 1, &out, &gathered.out, nullptr));
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 2, &lse, &gathered.lse, nullptr));
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 1, &dq, &gathered.dq, nullptr));
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 1, &dk, &gathered.dk, nullptr));
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 1, &dv, &gathered.dv, nullptr));
  DATTN_OK_OR_FAIL(dattn_unshard(rows, 1, &dbias, &gathered.dbias, nullptr));
  const std::lock_guard lock(results_mutex);
  for (std::size_t i = 0; i < dsink.values.size(); ++i) gathered.dsink.values[i] = results.dsink.values[i] + dsink.values[i];
  results = std::move(gathered);
}

Results run(std::vector<dattn_comm*> comms, const dattn_mesh_options& axes, const Whole& whole) {
  Results results;
  std::mutex mutex;
  on_threads(std::move(comms), [&](dattn_comm* comm) { attend(comm, axes, whole, results, mutex); });
  return results;
}

void expect_equal(const Results& a, const Results& b) {
  EXPECT_LT(difference(a.out, b.out), 2e-6);
  EXPECT_LT(difference(a.lse, b.lse), 5e-6);
  EXPECT_LT(difference(a.dq, b.dq), 1e-5);
  EXPECT_LT(difference(a.dk, b.dk), 1e-5);
  EXPECT_LT(difference(a.dv, b.dv), 1e-5);
  EXPECT_LT(difference(a.dbias, b.dbias), 1e-5);
  EXPECT_LT(difference(a.dsink, b.dsink), 1e-4);
}

// A causal plan of one batch row, two positions and one head of dim 1, on one rank.
class TwoRows {
 public:
  explicit TwoRows(dattn_dtype dtype) { make(dtype); }
  operator dattn_plan*() const { return plan_; }  // NOLINT

 private:
  void make(dattn_dtype dtype) {
    DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context_));
    DATTN_OK_OR_FAIL(dattn_comm_self(context_, &comm_));
    auto axes = sized<dattn_mesh_options>();
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm_, &axes, &mesh_));
    auto options = sized<dattn_attention_options>();
    options.batch = 1, options.seq_q = 2, options.heads = 1, options.dim_qk = 1;
    options.dtype = dtype;
    DATTN_OK_OR_FAIL(dattn_plan_create(mesh_, &options, &plan_));
  }
  ContextHandle context_;
  CommHandle comm_;
  MeshHandle mesh_;
  PlanHandle plan_;
};

// Slow and plain: softmax over visible pairs, without dropout, for one row.
TEST(CAttention, OneRowByHand) {
  const TwoRows plan(kFp32);
  HostTensor q({1, 2, 1, 1}), k({1, 2, 1, 1}), v({1, 2, 1, 1}), out({1, 2, 1, 1}), lse({1, 1, 2});
  q.values = {1, 2}, k.values = {0.5, 1}, v.values = {3, 5};
  auto forward = sized<dattn_forward>();
  forward.q = &q, forward.k = &k, forward.v = &v, forward.out = &out, forward.lse = &lse;
  DATTN_OK_OR_FAIL(dattn_attention_forward(plan, &forward));
  const double a = std::exp(1.0), b = std::exp(2.0);  // scores 2 * 0.5 and 2 * 1; the first query sees the first key alone
  EXPECT_FLOAT_EQ(out.values[0], 3);
  EXPECT_FLOAT_EQ(out.values[1], static_cast<float>((3 * a + 5 * b) / (a + b)));
  EXPECT_FLOAT_EQ(lse.values[0], 0.5f);
  EXPECT_FLOAT_EQ(lse.values[1], static_cast<float>(std::log(a + b)));
}

TEST(CAttention, TakesDLPacksFloat16) {
  constexpr dattn_dtype kFp16 = {DATTN_FLOAT, 16, 1};
  const TwoRows plan(kFp16);
  std::int64_t shape[] = {1, 2, 1, 1};
  std::uint16_t q_bits[] = {0x3c00, 0x4000}, k_bits[] = {0x3800, 0x3c00}, v_bits[] = {0x4200, 0x4500}, out_bits[2] = {};
  const auto tensor_of = [&](std::uint16_t* bits) {
    dattn_tensor tensor{};
    tensor.data = bits, tensor.device = {DATTN_CPU, 0}, tensor.ndim = 4, tensor.dtype = kFp16, tensor.shape = shape;
    return tensor;
  };
  const dattn_tensor q = tensor_of(q_bits), k = tensor_of(k_bits), v = tensor_of(v_bits), out = tensor_of(out_bits);
  auto forward = sized<dattn_forward>();
  forward.q = &q, forward.k = &k, forward.v = &v, forward.out = &out;
  DATTN_OK_OR_FAIL(dattn_attention_forward(plan, &forward));  // 1 2, 0.5 1 and 3 5, as above
  EXPECT_EQ(out_bits[0], 0x4200);
  EXPECT_EQ(out_bits[1], 0x4476);  // (3 e + 5 e^2) / (e + e^2) = 4.4621, to the nearest 2^-8
}

TEST(CAttention, IsTheSameOnEveryMeshOfThreads) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  const Whole whole;
  const Results alone = run(thread_ranks(context, 1), {}, whole);
  const dattn_mesh_options meshes[] = {
      {0, 0, 0, 3, 0, 0, 0}, {0, 0, 0, 2, 0, 2, 0}, {0, 0, 0, 0, 0, 4, 0}, {0, 0, 0, 2, 2, 0, 0}, {0, 0, 2, 2, 0, 0, 0}};
  for (const dattn_mesh_options& axes : meshes) {
    const auto size = [](int extent) { return extent == 0 ? 1 : extent; };
    const int ranks = size(axes.ring_outer) * size(axes.ring) * size(axes.rows) * size(axes.ulysses);
    SCOPED_TRACE("ring " + std::to_string(axes.ring) + ", rows " + std::to_string(axes.rows) + ", ulysses " +
                 std::to_string(axes.ulysses));
    expect_equal(alone, run(thread_ranks(context, ranks), axes, whole));
  }
}

TEST(CAttention, HasTheSameBitsOnEveryMeshWithDeterminismInvariant) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  Whole whole;
  whole.strategy = "ring", whole.determinism = "invariant";  // which has a strategy of its own
  testing::internal::CaptureStderr();
  const Results alone = run(thread_ranks(context, 1), {}, whole);
  const dattn_mesh_options meshes[] = {{0, 0, 0, 4, 0, 0, 0}, {0, 0, 0, 2, 0, 2, 0}};
  for (const dattn_mesh_options& axes : meshes) {
    const Results other = run(thread_ranks(context, 4), axes, whole);
    for (const auto member : {&Results::out, &Results::lse, &Results::dq, &Results::dk, &Results::dv}) {
      EXPECT_EQ(difference(alone.*member, other.*member), 0);
    }
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");  // that the strategy is replaced is no reason to print
}

TEST(CAttention, IsTheSameOverTheHostsCallbacks) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  const Whole whole;
  dattn_mesh_options axes{};
  axes.ring = 2, axes.ulysses = 2;
  CallbackHost host(4);
  const Results over_callbacks = run(host.comms(context), axes, whole),
                over_threads = run(thread_ranks(context, 4), axes, whole);
  EXPECT_EQ(difference(over_callbacks.out, over_threads.out), 0);
  EXPECT_EQ(difference(over_callbacks.dk, over_threads.dk), 0);
  EXPECT_EQ(host.released(), 4);
}

TEST(CAttention, PlansTellTheirCosts) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  on_threads(thread_ranks(context, 2), [](dattn_comm* comm) {
    MeshHandle mesh;
    PlanHandle plan;
    auto axes = sized<dattn_mesh_options>();
    axes.ring = 2;
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
    auto options = sized<dattn_attention_options>();
    options.batch = 1, options.seq_q = 64, options.heads = 4, options.kv_heads = 2, options.dim_qk = 32;
    options.dtype = {DATTN_BFLOAT, 16, 1};
    options.strategy = "ring";
    DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));
    auto info = sized<dattn_plan_info>();
    DATTN_OK_OR_FAIL(dattn_plan_get_info(plan, &info));
    EXPECT_EQ(info.q_rows, 32);
    EXPECT_EQ(info.heads, 4);
    EXPECT_EQ(info.kv_heads, 2);
    EXPECT_EQ(info.forward_bytes, 32 * 2 * 32 * 2 * 2);  // keys and values of the other rank, once
    const char* text = nullptr;
    DATTN_OK_OR_FAIL(dattn_plan_explain(plan, &text));
    EXPECT_NE(std::string(text).find("\"strategy\":\"ring\""), std::string::npos) << text;
    const std::int64_t state = 4 * 32 * (32 + 1) * 4;  // out and lse in fp32
    EXPECT_GE(info.forward_memory, info.forward_bytes + state);
    EXPECT_GT(info.backward_memory, info.forward_memory);
    const std::int64_t inputs = 3 * (32 * 4 * 32 * 2) + 2 * (4 * 32 * 4);  // q, keys and values, dout; lse and delta in fp32
    const std::string peak = "\"peak_memory_bytes\":" + std::to_string(info.backward_memory + inputs);
    EXPECT_NE(std::string(text).find(peak), std::string::npos) << text;
    std::vector<std::int64_t> positions(32);
    DATTN_OK_OR_FAIL(dattn_plan_positions(plan, 0, positions.data(), 32));
    EXPECT_EQ(positions[0], dattn_comm_rank(comm) == 0 ? 0 : 16);  // zigzag
    EXPECT_EQ(positions[31], dattn_comm_rank(comm) == 0 ? 63 : 47);
    EXPECT_EQ(dattn_plan_positions(plan, 0, positions.data(), 31), DATTN_BAD_INPUT);
  });
}

TEST(CAttention, ThePlannerAnswersWithoutRanks) {
  char* text = nullptr;
  DATTN_OK_OR_FAIL(
      dattn_plan_query("{shape: {seq: 65536, heads: 32, kv_heads: 8, dim: 128}, mesh: {ranks: 64}, dtype: bf16}", &text));
  EXPECT_NE(std::string(text).find("\"chosen\""), std::string::npos) << text;
  EXPECT_NE(std::string(text).find("\"ratio\""), std::string::npos) << text;
  EXPECT_NE(std::string(text).find("\"peak_memory_bytes\""), std::string::npos) << text;
  dattn_text_free(text);
  EXPECT_EQ(dattn_plan_query("{shape: {heads: 3, kv_heads: 2}}", &text), DATTN_BAD_INPUT);
}

TEST(CAttention, ReduceShardAddsAllRanks) {
  ContextHandle context;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
  on_threads(thread_ranks(context, 3), [](dattn_comm* comm) {
    MeshHandle mesh;
    ShardingHandle rows;
    auto axes = sized<dattn_mesh_options>();
    axes.ring = 3;
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
    DATTN_OK_OR_FAIL(dattn_sharding_create(mesh, 11, "striped", nullptr, &rows));
    HostTensor whole({2, 11, 3});
    for (std::size_t i = 0; i < whole.values.size(); ++i) {
      whole.values[i] = static_cast<float>(i) * static_cast<float>(dattn_comm_rank(comm) + 1);
    }
    HostTensor mine({2, dattn_sharding_rows(rows), 3});
    DATTN_OK_OR_FAIL(dattn_reduce_shard(rows, 1, &whole, &mine, nullptr));
    const std::size_t row = 1, element = 2;  // of batch row 1: position rank + 3 * row
    const std::size_t global = (11 + static_cast<std::size_t>(dattn_comm_rank(comm)) + 3 * row) * 3 + element;
    const std::size_t local = (static_cast<std::size_t>(mine.shape[1]) + row) * 3 + element;
    EXPECT_EQ(mine.values[local], static_cast<float>(global) * 6);
  });
}

}  // namespace
}  // namespace dattn::test
