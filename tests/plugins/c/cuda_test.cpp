// Tensors of a CUDA device through the C interface, on the caller's stream. Where there is no GPU the module is the stand-in
// that DATTN_CUDA_MODULE names.
#include <dlfcn.h>

#include <cstdlib>

#include "core/device/cuda_module.h"
#include "parallel/comm/nccl_api.h"
#include "tests/plugins/c/fixture.h"

namespace dattn::test {
namespace {

// The module's functions for the part of a framework that owns memory and streams; libdattn.so takes its own place when it
// loads the module. nullptr where there is none.
const CudaModule* framework() {
  const char* path = std::getenv("DATTN_CUDA_MODULE");
  void* library = path != nullptr ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  void* entry = library != nullptr ? dlsym(library, "dattn_cuda_module") : nullptr;
  return entry != nullptr ? reinterpret_cast<const CudaModule* (*)(const CudaHost*)>(entry)(nullptr) : nullptr;
}

struct DeviceTensor {
  const CudaModule& cuda;
  NativeStream stream;
  HostTensor host;  // shape, and a place to read into
  dattn_tensor tensor;

  DeviceTensor(const CudaModule& module, NativeStream on, HostTensor values, int device = 0)
      : cuda(module), stream(on), host(std::move(values)), tensor(host.tensor) {
    tensor.shape = host.shape.data();
    tensor.data = cuda.allocate(bytes(), stream);
    tensor.device = {DATTN_CUDA, device};
    cuda.copy_bytes(tensor.data, host.values.data(), bytes(), stream);
  }
  ~DeviceTensor() { cuda.free(tensor.data, stream); }
  DeviceTensor(const DeviceTensor&) = delete;
  DeviceTensor& operator=(const DeviceTensor&) = delete;

  std::size_t bytes() const { return host.values.size() * sizeof(float); }
  HostTensor& read() {
    cuda.copy_bytes(host.values.data(), tensor.data, bytes(), stream);
    cuda.synchronize(stream);
    return host;
  }
};

struct Call {
  dattn_forward forward{};
  dattn_backward backward{};

  Call(const dattn_tensor* q, const dattn_tensor* k, const dattn_tensor* v, const dattn_tensor* out, const dattn_tensor* lse,
       const dattn_tensor* dout, const dattn_tensor* dq, const dattn_tensor* dk, const dattn_tensor* dv, void* stream) {
    forward.struct_size = sizeof forward;
    backward.struct_size = sizeof backward;
    forward.q = backward.q = q, forward.k = backward.k = k, forward.v = backward.v = v;
    forward.out = backward.out = out, forward.lse = backward.lse = lse;
    backward.dout = dout, backward.dq = dq, backward.dk = dk, backward.dv = dv;
    forward.stream = backward.stream = stream;
  }
  void run(dattn_device device) const {
    ContextHandle context;
    CommHandle comm;
    MeshHandle mesh;
    PlanHandle plan;
    auto on = sized<dattn_context_options>();
    on.device = device;
    auto axes = sized<dattn_mesh_options>();
    auto options = sized<dattn_attention_options>();
    options.batch = 1, options.seq_q = 40, options.heads = 2, options.dim_qk = 16;
    options.dtype = kFp32;
    DATTN_OK_OR_FAIL(dattn_context_create(&on, &context));
    DATTN_OK_OR_FAIL(dattn_comm_self(context, &comm));
    DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
    DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));
    DATTN_OK_OR_FAIL(dattn_attention_forward(plan, &forward));
    DATTN_OK_OR_FAIL(dattn_attention_backward(plan, &backward));
  }
};

void compare(bool own_stream) {
  ContextHandle context;
  auto on = sized<dattn_context_options>();
  on.device = {DATTN_CUDA, 0};
  if (dattn_context_create(&on, &context) != DATTN_OK) GTEST_SKIP() << dattn_last_error();
  const CudaModule* cuda = framework();
  if (cuda == nullptr) GTEST_SKIP() << "no CUDA module; set DATTN_CUDA_MODULE";
  cuda->set_device(0);
  const NativeStream stream = own_stream ? cuda->make_stream(false) : nullptr;
  const auto values = [](int which) { return HostTensor::random({1, 40, 2, 16}, which); };
  HostTensor q = values(1), k = values(2), v = values(3), dout = values(4), out = values(0), lse({1, 2, 40});
  HostTensor dq = values(0), dk = values(0), dv = values(0);
  Call(&q, &k, &v, &out, &lse, &dout, &dq, &dk, &dv, nullptr).run({DATTN_CPU, 0});
  DeviceTensor on_q(*cuda, stream, values(1)), on_k(*cuda, stream, values(2)), on_v(*cuda, stream, values(3));
  DeviceTensor on_dout(*cuda, stream, values(4)), on_out(*cuda, stream, values(0)),
      on_lse(*cuda, stream, HostTensor({1, 2, 40}));
  DeviceTensor on_dq(*cuda, stream, values(0)), on_dk(*cuda, stream, values(0)), on_dv(*cuda, stream, values(0));
  Call(&on_q.tensor, &on_k.tensor, &on_v.tensor, &on_out.tensor, &on_lse.tensor, &on_dout.tensor, &on_dq.tensor, &on_dk.tensor,
       &on_dv.tensor, stream)
      .run({DATTN_CUDA, 0});
  EXPECT_LT(difference(out, on_out.read()), 2e-6);
  EXPECT_LT(difference(lse, on_lse.read()), 2e-6);
  EXPECT_LT(difference(dq, on_dq.read()), 1e-5);
  EXPECT_LT(difference(dk, on_dk.read()), 1e-5);
  EXPECT_LT(difference(dv, on_dv.read()), 1e-5);
}

// A device for each of two ranks, joined by NCCL: every rank's rows of x reach the other one through an attention in which
// every query sees one key alone, that of its mirror image. lent: the host's ncclComm_t, or nullptr.
void mirror_over_nccl(dattn_comm* control, void* lent) {
  constexpr std::int64_t kSeq = 12, kDim = 4;
  const int rank = dattn_comm_rank(control);
  ContextHandle context;
  CommHandle comm;
  MeshHandle mesh;
  PlanHandle plan;
  auto on = sized<dattn_context_options>();
  on.device = {DATTN_CUDA, rank};
  DATTN_OK_OR_FAIL(dattn_context_create(&on, &context));
  DATTN_OK_OR_FAIL(dattn_comm_nccl(context, control, lent, nullptr, &comm));
  auto axes = sized<dattn_mesh_options>();
  axes.ring = 2;
  DATTN_OK_OR_FAIL(dattn_mesh_create(comm, &axes, &mesh));
  std::string mask = "{mask: {kind: blocks, size: 1, list: [";
  for (int i = 0; i < kSeq; ++i) mask += "[" + std::to_string(i) + ", " + std::to_string(kSeq - 1 - i) + "], ";
  mask += "]}}";
  auto options = sized<dattn_attention_options>();
  options.batch = 1, options.seq_q = kSeq, options.heads = 1, options.dim_qk = kDim;
  options.dtype = kFp32;
  options.layout = "contiguous";
  options.attention = mask.c_str();
  DATTN_OK_OR_FAIL(dattn_plan_create(mesh, &options, &plan));

  const CudaModule& cuda = *framework();
  cuda.set_device(rank);
  HostTensor mine({1, kSeq / 2, 1, kDim});
  for (std::size_t i = 0; i < mine.values.size(); ++i) mine.values[i] = static_cast<float>(rank * 100 + static_cast<int>(i));
  DeviceTensor x(cuda, nullptr, std::move(mine), rank), out(cuda, nullptr, HostTensor({1, kSeq / 2, 1, kDim}), rank);
  auto call = sized<dattn_forward>();
  call.q = call.k = call.v = &x.tensor;
  call.out = &out.tensor;
  DATTN_OK_OR_FAIL(dattn_attention_forward(plan, &call));
  const HostTensor& seen = out.read();
  for (std::int64_t row = 0; row < kSeq / 2; ++row) {
    EXPECT_EQ(seen.values[static_cast<std::size_t>(row * kDim)], static_cast<float>((1 - rank) * 100 + (5 - row) * kDim));
  }
}

TEST(CCuda, NcclJoinsARankForEachDevice) {
  if (std::getenv("DATTN_NCCL") == nullptr) GTEST_SKIP() << "no NCCL; set DATTN_NCCL";
  ContextHandle host;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &host));
  on_threads(thread_ranks(host, 2), [](dattn_comm* control) { mirror_over_nccl(control, nullptr); });
}

// NCCL as the host has it, which makes communicators of its own.
struct HostNccl : nccl::Api {
  HostNccl() {
    find(get_unique_id, "ncclGetUniqueId");
    find(comm_init_rank_config, "ncclCommInitRankConfig");
    find(comm_get_async_error, "ncclCommGetAsyncError");
    find(comm_destroy, "ncclCommDestroy");
  }
  nccl::Comm join(int ranks, const nccl::UniqueId& id, int rank) const {
    nccl::Comm made = nullptr;
    nccl::Config config;
    EXPECT_EQ(comm_init_rank_config(&made, ranks, id, rank, &config), nccl::kSuccess);
    return made;
  }

 private:
  template <class Function>
  void find(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(dlsym(library_, name));
  }
  void* library_ = dlopen(std::getenv("DATTN_NCCL"), RTLD_NOW | RTLD_LOCAL);
};

TEST(CCuda, TheHostsNcclIsBorrowedAndLeftAlone) {
  if (std::getenv("DATTN_NCCL") == nullptr) GTEST_SKIP() << "no NCCL; set DATTN_NCCL";
  const HostNccl api;
  nccl::UniqueId id{};
  ASSERT_EQ(api.get_unique_id(&id), nccl::kSuccess);
  ContextHandle host;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &host));
  on_threads(thread_ranks(host, 2), [&](dattn_comm* control) {
    const int rank = dattn_comm_rank(control);
    framework()->set_device(rank);
    const nccl::Comm lent = api.join(2, id, rank);
    mirror_over_nccl(control, lent);
    nccl::Result state = nccl::kInternalError;
    EXPECT_EQ(api.comm_get_async_error(lent, &state), nccl::kSuccess);
    EXPECT_EQ(state, nccl::kSuccess);
    EXPECT_EQ(api.comm_destroy(lent), nccl::kSuccess);
  });
}

TEST(CCuda, NcclOfOtherRanksIsRefused) {
  if (std::getenv("DATTN_NCCL") == nullptr) GTEST_SKIP() << "no NCCL; set DATTN_NCCL";
  const HostNccl api;
  ContextHandle host;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &host));
  on_threads(thread_ranks(host, 2), [&](dattn_comm* control) {
    const int rank = dattn_comm_rank(control);
    framework()->set_device(rank);
    nccl::UniqueId id{};
    ASSERT_EQ(api.get_unique_id(&id), nccl::kSuccess);
    const nccl::Comm alone = api.join(1, id, 0);
    ContextHandle context;
    CommHandle comm;
    auto on = sized<dattn_context_options>();
    on.device = {DATTN_CUDA, rank};
    DATTN_OK_OR_FAIL(dattn_context_create(&on, &context));
    EXPECT_EQ(dattn_comm_nccl(context, control, alone, nullptr, &comm), DATTN_BAD_INPUT);
    EXPECT_NE(std::string(dattn_last_error()).find("lend one of the same ranks"), std::string::npos) << dattn_last_error();
    EXPECT_EQ(api.comm_destroy(alone), nccl::kSuccess);
  });
}

TEST(CCuda, NcclIsForDevices) {
  ContextHandle host;
  CommHandle control, comm;
  DATTN_OK_OR_FAIL(dattn_context_create(nullptr, &host));
  DATTN_OK_OR_FAIL(dattn_comm_self(host, &control));
  EXPECT_EQ(dattn_comm_nccl(host, control, nullptr, nullptr, &comm), DATTN_BAD_INPUT);
}

TEST(CCuda, AttentionOnTheCallersStream) { compare(true); }
TEST(CCuda, AttentionOnTheDefaultStream) { compare(false); }

}  // namespace
}  // namespace dattn::test
