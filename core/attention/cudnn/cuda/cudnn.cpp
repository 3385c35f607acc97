// Attention graphs by cuDNN's front end, the one file that includes it (40 s to compile). Tensors have cuDNN's order of axes,
// [B, H, S, D], by their strides.
#include <array>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/attention/cudnn/cuda/graph.h"

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>

#include "core/attention/cudnn/library.h"
#include "core/base/error.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where the front end looks functions up
}

namespace dattn::cudnn {
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Uid : std::int64_t { kQ = 1, kK, kV, kBias, kOut, kStats, kDout, kDq, kDk, kDv };

bool load() {
  static const bool loaded = [] {
    fe::cudnn_dlhandle = library().handle;
    return fe::cudnn_dlhandle != nullptr;
  }();
  return loaded;
}

fe::DataType_t type_of(DType storage) { return storage == DType::kF16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16; }

fe::graph::Tensor_attributes tensor(Uid uid, const char* name, std::array<std::int64_t, 4> dims, const Strides& strides) {
  return fe::graph::Tensor_attributes()
      .set_uid(uid)
      .set_name(name)
      .set_dim({dims.begin(), dims.end()})
      .set_stride({strides.batch, strides.head, strides.row, 1});
}

// Of a contiguous [B, rows, heads, dim].
Strides contiguous(std::int64_t rows, std::int64_t heads, std::int64_t dim) { return {rows * heads * dim, heads * dim, dim}; }

void set_result(const Tensor& result, const fe::graph::Tensor_attributes& like) {
  result->set_output(true)
      .set_uid(like.get_uid())
      .set_dim(like.get_dim())
      .set_stride(like.get_stride())
      .set_data_type(like.get_data_type());
}

template <class Attributes>
void set_scores(const GraphProblem& p, fe::graph::Graph& graph, Attributes& attributes) {
  attributes.set_name("attention").set_attn_scale(static_cast<float>(p.scale));
  if (p.left) attributes.set_diagonal_band_left_bound(static_cast<int>(*p.left));
  if (p.right) attributes.set_diagonal_band_right_bound(static_cast<int>(*p.right));
  if (p.has_bias)
    attributes.set_bias(graph.tensor(tensor(kBias, "bias", {p.bias_batch, p.bias_heads, p.rows, p.keys}, p.bias)));
}

void describe(const GraphProblem& p, fe::graph::Graph& graph) {
  const std::array<std::int64_t, 4> q_dims{p.batch, p.heads, p.rows, p.dim_qk}, k_dims{p.batch, p.kv_heads, p.keys, p.dim_qk},
      v_dims{p.batch, p.kv_heads, p.keys, p.dim_v}, out_dims{p.batch, p.heads, p.rows, p.dim_v};
  const Tensor q = graph.tensor(tensor(kQ, "q", q_dims, p.q)), k = graph.tensor(tensor(kK, "k", k_dims, p.k)),
               v = graph.tensor(tensor(kV, "v", v_dims, p.v));
  auto stats = tensor(kStats, "stats", {p.batch, p.heads, p.rows, 1}, {p.heads * p.rows, 1, p.rows});
  stats.set_data_type(fe::DataType_t::FLOAT);
  if (!p.backward) {
    fe::graph::SDPA_attributes attributes;
    set_scores(p, graph, attributes);
    attributes.set_generate_stats(true);
    const auto [out, lse] = graph.sdpa(q, k, v, attributes);
    set_result(out, tensor(kOut, "out", out_dims, contiguous(p.rows, p.heads, p.dim_v)));
    set_result(lse, stats);
    return;
  }
  fe::graph::SDPA_backward_attributes attributes;
  set_scores(p, graph, attributes);
  attributes.set_deterministic_algorithm(p.deterministic);
  const auto [dq, dk, dv] =
      graph.sdpa_backward(q, k, v, graph.tensor(tensor(kOut, "out", out_dims, p.dout)),
                          graph.tensor(tensor(kDout, "dout", out_dims, p.dout)), graph.tensor(stats), attributes);
  set_result(dq, tensor(kDq, "dq", q_dims, contiguous(p.rows, p.heads, p.dim_qk)));
  set_result(dk, tensor(kDk, "dk", k_dims, contiguous(p.keys, p.kv_heads, p.dim_qk)));
  set_result(dv, tensor(kDv, "dv", v_dims, contiguous(p.keys, p.kv_heads, p.dim_v)));
}

void check(cudnnStatus_t status, const char* call) {
  if (status != CUDNN_STATUS_SUCCESS) fail(ErrorCode::kSystem, "cuDNN: {}: {}", call, fe::detail::get_error_string(status));
}

// cuDNN's handles are for one thread at a time; as many are made as threads were ever inside at once, and kept: destroying one
// while the process ends would ask a driver that is gone.
class Handle {
 public:
  explicit Handle(int device) : device_(device) {
    {
      const std::lock_guard lock(pool().mutex);
      auto& free = pool().free[device];
      if (!free.empty()) {
        handle_ = free.back();
        free.pop_back();
        return;
      }
    }
    check(fe::detail::create_handle(&handle_), "cudnnCreate");
  }
  ~Handle() {
    const std::lock_guard lock(pool().mutex);
    pool().free[device_].push_back(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  cudnnHandle_t get() const { return handle_; }

 private:
  struct Pool {
    std::mutex mutex;
    std::map<int, std::vector<cudnnHandle_t>> free;  // by device
  };
  static Pool& pool() {
    static auto* const instance = new Pool;
    return *instance;
  }

  int device_;
  cudnnHandle_t handle_ = nullptr;
};

class FrontEndPlan : public GraphPlan {
 public:
  FrontEndPlan(std::unique_ptr<fe::graph::Graph> graph, int device) : graph_(std::move(graph)), device_(device) {
    fe::error_t error = graph_->get_workspace_size(workspace_);
    if (error.is_bad()) fail(ErrorCode::kSystem, "cuDNN: size of the workspace: {}", error.get_message());
  }

  std::int64_t workspace_bytes() const override { return workspace_; }

  void run(const Buffers& b, void* workspace, void* stream) const override {
    std::unordered_map<std::int64_t, void*> pack;
    for (const auto& [uid, memory] : {std::pair{kQ, b.q},
                                      {kK, b.k},
                                      {kV, b.v},
                                      {kBias, b.bias},
                                      {kOut, b.out},
                                      {kStats, b.stats},
                                      {kDout, b.dout},
                                      {kDq, b.dq},
                                      {kDk, b.dk},
                                      {kDv, b.dv}}) {
      if (memory != nullptr) pack[uid] = memory;
    }
    const Handle handle(device_);
    check(fe::detail::set_stream(handle.get(), static_cast<cudaStream_t>(stream)), "cudnnSetStream");
    fe::error_t error = graph_->execute(handle.get(), pack, workspace);
    if (error.is_bad()) fail(ErrorCode::kSystem, "cuDNN: attention on cuda:{}: {}", device_, error.get_message());
  }

 private:
  std::unique_ptr<fe::graph::Graph> graph_;
  int device_;
  std::int64_t workspace_ = 0;
};

// The first step that fails, in cuDNN's words.
fe::error_t plan(fe::graph::Graph& graph, cudnnHandle_t handle) {
  fe::error_t error = graph.validate();
  if (error.is_good()) error = handle != nullptr ? graph.build_operation_graph(handle) : graph.build_operation_graph();
  if (error.is_good()) error = graph.create_execution_plans({fe::HeurMode_t::A});
  if (error.is_good()) error = graph.check_support();
  if (error.is_good()) error = graph.build_plans();
  return error;
}

fe::error_t plan_for(const GraphProblem& problem, fe::graph::Graph& graph, const Target& target) {
  if (!target.properties.empty()) {  // before anything is described: the front end would ask the present device
    auto properties = std::make_shared<fe::DeviceProperties>();
    fe::error_t error = properties->deserialize({target.properties.begin(), target.properties.end()});
    if (error.is_bad()) return error;
    graph.set_device_properties(properties).set_sm_version(target.compute_capability);
    describe(problem, graph);
    return plan(graph, nullptr);
  }
  describe(problem, graph);
  return plan(graph, Handle(target.device).get());
}

}  // namespace

std::string missing() { return load() ? "" : library().why; }

std::string version() { return load() ? version_text(library().version) : ""; }

Planned make_plan(const GraphProblem& problem, const Target& target) {
  if (!load()) return {nullptr, library().why};
  try {
    auto graph = std::make_unique<fe::graph::Graph>();
    graph->set_io_data_type(type_of(problem.storage))
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    fe::error_t error = plan_for(problem, *graph, target);
    if (error.is_bad()) return {nullptr, error.get_message()};
    return {std::make_unique<FrontEndPlan>(std::move(graph), target.device), {}};
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {  // of the front end: a library or function that it could not load
    return {nullptr, error.what()};
  }
}

}  // namespace dattn::cudnn
