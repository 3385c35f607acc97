// What the C boundary promises: clear refusals before anything is sent, versions of structs, lost peers, lifetimes.
#include <cstring>

#include "tests/plugins/c/callback_host.h"
#include "tests/plugins/c/fixture.h"

namespace dattn::test {
namespace {

using testing::Test;

bool says(const std::string& part) { return std::string(dattn_last_error()).find(part) != std::string::npos; }

struct CBoundary : Test {
  ContextHandle context;
  CommHandle comm;
  MeshHandle mesh;
  dattn_mesh_options axes{};
  dattn_attention_options options{};

  void SetUp() override {
    DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &context));
    DATTN_OK_OR_FAIL(dattn_comm_self(context, &comm));
    axes.struct_size = sizeof axes;
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
    set_options();
  }
  void set_options() {
    options = {};
    options.struct_size = sizeof options;
    options.batch = 1, options.seq_q = 8, options.heads = 2, options.dim_qk = 4;
    options.dtype = kFp32;
  }
  dattn_status plan_status() {
    PlanHandle plan;
    const dattn_status status = dattn_plan_create(mesh, &options, &plan);
    EXPECT_EQ(status == DATTN_OK, plan.held != nullptr);
    return status;
  }
};

TEST_F(CBoundary, ShortStructsHaveDefaultsAndLongOnesMustBeEmpty) {
  options.struct_size = offsetof(dattn_attention_options, attention);  // of a caller that knows no texts yet
  options.attention = "not even YAML: [";
  EXPECT_EQ(plan_status(), DATTN_OK) << dattn_last_error();
  options.struct_size = sizeof options;
  EXPECT_EQ(plan_status(), DATTN_BAD_INPUT);

  struct Newer {
    dattn_mesh_options known;
    std::int64_t unknown;
  } newer{};
  newer.known.struct_size = sizeof newer;
  MeshHandle other;
  EXPECT_EQ(dattn_mesh_create(comm, &newer.known, &other), DATTN_OK) << dattn_last_error();
  newer.unknown = 1;
  MeshHandle refused;
  EXPECT_EQ(dattn_mesh_create(comm, &newer.known, &refused), DATTN_BAD_INPUT);
  EXPECT_TRUE(says("does not know")) << dattn_last_error();
  options.struct_size = 0;
  EXPECT_EQ(plan_status(), DATTN_BAD_INPUT);
  EXPECT_TRUE(says("struct_size")) << dattn_last_error();
}

TEST_F(CBoundary, RefusesWhatCannotBePlanned) {
  const auto refused = [&](const std::string& why) {
    EXPECT_EQ(plan_status(), DATTN_BAD_INPUT);
    EXPECT_TRUE(says(why)) << dattn_last_error();
    set_options();
  };
  options.attention = "{mask: {kind: cuasal}}";
  refused("'cuasal', not one of");
  options.attention = "{mask: {kind: documents, cu_seqlens: [0, 9]}}";
  refused("9");
  options.strategy = "rign";
  refused("rign");
  options.layout = "zagzig";
  refused("zagzig");
  options.determinism = "always";
  refused("repeatable");
  options.heads = 3, options.kv_heads = 2;
  refused("no multiple");
  options.dtype = {DATTN_INT, 32, 1};
  refused("bfloat 16");
  options.dtype = {DATTN_FLOAT, 8, 1};
  refused("float 16, 32 or 64");
  options.bias = 64;
  refused("flags");
  axes.ring = 2;
  MeshHandle wrong;
  EXPECT_EQ(dattn_mesh_create(comm, &axes, &wrong), DATTN_BAD_INPUT);
  EXPECT_TRUE(says("2") && says("1")) << dattn_last_error();
  EXPECT_EQ(wrong.held, nullptr);
}

TEST_F(CBoundary, RefusesTensorsOfOtherShapesTypesAndDevices) {
  PlanHandle plan;
  DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));
  HostTensor q({1, 8, 2, 4}), k({1, 8, 2, 4}), v({1, 8, 2, 4}), out({1, 8, 2, 4});
  auto call = sized<dattn_forward>();
  call.q = &q, call.k = &k, call.v = &v, call.out = &out;
  EXPECT_EQ(dattn_attention_forward(plan, &call), DATTN_OK) << dattn_last_error();  // lse is not wanted
  const auto refused = [&](const std::string& why) {
    EXPECT_EQ(dattn_attention_forward(plan, &call), DATTN_BAD_INPUT);
    EXPECT_TRUE(says(why)) << dattn_last_error();
    call.q = &q, call.k = &k, call.out = &out, call.sink = nullptr, call.dropout_stream = 0;
  };
  HostTensor shorter({1, 7, 2, 4});
  call.k = &shorter;
  refused("[1, 7, 2, 4]");
  call.out = &shorter;
  refused("[1, 7, 2, 4]");
  dattn_tensor wrong = q.tensor;
  wrong.dtype = {DATTN_BFLOAT, 16, 1};
  call.q = &wrong;
  refused("bf16");
  wrong = q.tensor;
  wrong.device = {DATTN_CUDA, 0};
  call.q = &wrong;
  refused("cuda:0");
  wrong = q.tensor;
  wrong.ndim = 3;
  call.q = &wrong;
  refused("3 axes");
  wrong = q.tensor;
  wrong.data = nullptr;
  call.q = &wrong;
  refused("NULL");
  std::int64_t strides[] = {64, 8, 1, 2};
  wrong = q.tensor;
  wrong.strides = strides;
  call.q = &wrong;
  refused("contiguous");
  call.k = nullptr;
  refused("k is NULL");
  HostTensor sink({2});
  call.sink = &sink;
  refused("without sink");
  call.dropout_stream = 1ull << 40;
  refused("2^32");
  EXPECT_EQ(dattn_attention_forward(nullptr, &call), DATTN_BAD_INPUT);
  EXPECT_EQ(dattn_attention_forward(plan, nullptr), DATTN_BAD_INPUT);
}

TEST_F(CBoundary, HandlesKeepAliveWhatTheyWereMadeFrom) {
  PlanHandle plan;
  DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));
  dattn_mesh_destroy(nullptr);
  {
    const MeshHandle gone_first(std::exchange(mesh.held, nullptr));
    const CommHandle gone(std::exchange(comm.held, nullptr));
    const ContextHandle gone_too(std::exchange(context.held, nullptr));
  }
  HostTensor q({1, 8, 2, 4}), out({1, 8, 2, 4});
  auto call = sized<dattn_forward>();
  call.q = call.k = call.v = &q;
  call.out = &out;
  EXPECT_EQ(dattn_attention_forward(plan, &call), DATTN_OK) << dattn_last_error();
}

TEST_F(CBoundary, MessagesAreOfTheThreadThatFailed) {
  options.strategy = "nowhere";
  EXPECT_EQ(plan_status(), DATTN_BAD_INPUT);
  std::string other = "?";
  std::thread([&] { other = dattn_last_error(); }).join();
  EXPECT_EQ(other, "");
  EXPECT_TRUE(says("nowhere"));
}

TEST_F(CBoundary, ADeviceThatIsNotThereIsRefused) {
  auto on = sized<dattn_context_options>();
  on.device = {DATTN_CUDA, 99};
  ContextHandle none;
  EXPECT_NE(dattn_context_create(&on, &none), DATTN_OK);
  EXPECT_TRUE(says("cuda")) << dattn_last_error();
  on.device = {17, 0};
  EXPECT_EQ(dattn_context_create(&on, &none), DATTN_BAD_INPUT);
  EXPECT_EQ(none.held, nullptr);
}

// One call of attention over a ring; its status.
dattn_status call_ring(dattn_comm* comm, std::string* message) {
  MeshHandle mesh;
  PlanHandle plan;
  auto axes = sized<dattn_mesh_options>();
  axes.ring = dattn_comm_size(comm);
  EXPECT_EQ(dattn_mesh_create(comm, &axes, &mesh), DATTN_OK) << dattn_last_error();
  auto options = sized<dattn_attention_options>();
  options.batch = 1, options.seq_q = 12, options.heads = 1, options.dim_qk = 4;
  options.dtype = kFp32;
  options.strategy = "ring";
  EXPECT_EQ(dattn_plan_create(mesh, &options, &plan), DATTN_OK) << dattn_last_error();
  auto info = sized<dattn_plan_info>();
  EXPECT_EQ(dattn_plan_get_info(plan, &info), DATTN_OK);
  const HostTensor q({1, info.q_rows, 1, 4}), out({1, info.q_rows, 1, 4});
  auto call = sized<dattn_forward>();
  call.q = call.k = call.v = &q;
  call.out = &out;
  const dattn_status status = dattn_attention_forward(plan, &call);
  *message = dattn_last_error();
  return status;
}

TEST_F(CBoundary, ALostPeerEndsTheCallOnEveryRankWithinTheDeadline) {
  CallbackHost host(3);
  host.lose(1);
  std::vector<dattn_status> statuses(3);
  std::vector<std::string> messages(3);
  std::vector<double> seconds(3);
  on_threads(host.comms(context, 0.3), [&](dattn_comm* rank) {
    const auto at = static_cast<std::size_t>(dattn_comm_rank(rank));
    const auto begin = std::chrono::steady_clock::now();
    statuses[at] = call_ring(rank, &messages[at]);
    seconds[at] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  });
  // Rank 2 waits for rank 1, rank 0 for rank 2; rank 1 itself hears all it needs.
  EXPECT_EQ(statuses, (std::vector{DATTN_PEER, DATTN_OK, DATTN_PEER}));
  for (const double waited : seconds) EXPECT_LT(waited, 2);
  EXPECT_NE(messages[2].find("nothing came from rank 1"), std::string::npos) << messages[2];
  EXPECT_NE(messages[2].find("rank 2/3"), std::string::npos) << messages[2];
  EXPECT_GE(host.aborts(), 1);
  EXPECT_EQ(host.released(), 3);
}

TEST_F(CBoundary, AThreadThatLeavesIsNotWaitedFor) {
  std::vector<dattn_status> statuses(2);
  std::vector<std::string> messages(2);
  on_threads(thread_ranks(context, 2, 30), [&](dattn_comm* rank) {
    const auto at = static_cast<std::size_t>(dattn_comm_rank(rank));
    if (at == 1) return;  // destroys its communicator
    statuses[at] = call_ring(rank, &messages[at]);
  });
  EXPECT_EQ(statuses[0], DATTN_PEER);
  EXPECT_NE(messages[0].find("rank 1"), std::string::npos) << messages[0];
}

TEST_F(CBoundary, AnAbortIsHeardByAll) {
  std::vector<std::string> messages(2);
  on_threads(thread_ranks(context, 2, 30), [&](dattn_comm* rank) {
    const auto at = static_cast<std::size_t>(dattn_comm_rank(rank));
    if (at == 1) return dattn_comm_abort(rank, "the host ran out of patience");
    EXPECT_EQ(call_ring(rank, &messages[at]), DATTN_PEER);
  });
  EXPECT_NE(messages[0].find("out of patience"), std::string::npos) << messages[0];
}

}  // namespace
}  // namespace dattn::test
