// Plans, and attention over them.
#include <limits>
#include <optional>

#include "core/attention/state.h"
#include "parallel/lower_bound.h"
#include "parallel/rank_plan.h"
#include "parallel/report.h"
#include "parallel/verify.h"
#include "plugins/c/handles.h"
#include "plugins/c/options.h"
#include "plugins/c/tensor.h"

namespace dattn::c {
namespace {

struct PlannedAttention {
  std::shared_ptr<MeshOnComm> mesh;
  ShardedAttention attention;
  std::string explanation = {};  // once asked for

  const Problem& problem() const { return *attention.forward_plan().problem; }
  Device device() const { return mesh->device(); }
};

dattn_plan_info info_of(const PlannedAttention& plan) {
  const RankPlan &forward = plan.attention.forward_rank_plan(), &backward = plan.attention.backward_rank_plan();
  const HeadRange heads = plan.attention.heads();
  dattn_plan_info info{};
  info.q_rows = plan.attention.q_positions().count();
  info.kv_rows = plan.attention.kv_positions().count();
  info.first_head = heads.q.begin;
  info.heads = heads.q.count();
  info.first_kv_head = heads.kv.begin;
  info.kv_heads = heads.kv.count();
  info.forward_bytes = forward.cost.bytes_received;
  info.backward_bytes = backward.cost.bytes_received;
  info.forward_stats_bytes = forward.cost.stats_bytes;
  info.backward_stats_bytes = backward.cost.stats_bytes;
  info.forward_memory = forward.cost.peak_memory;
  info.backward_memory = backward.cost.peak_memory;
  info.forward_flops = forward.flops();
  info.backward_flops = backward.flops();
  return info;
}

std::string explain(const PlannedAttention& plan) {
  const Plan &forward = plan.attention.forward_plan(), &backward = plan.attention.backward_plan();
  const Problem& problem = plan.problem();
  Json json{{"strategy", forward.strategy}, {"layout", name_of(problem.layout)}, {"mask", problem.mask_text}};
  json["mesh"] = to_json(problem.mesh);
  json.update(plan_costs(forward, backward));
  const double least = lower_bound_bytes(problem.shape, problem.mesh);
  json["lower_bound_bytes"] = least;
  json["ratio"] = ratio_over(json["bytes_per_rank"]["forward"].get<double>(), least);
  json["steps"] = {{"forward", forward.text()}, {"backward", backward.text()}};
  return json.dump();
}

// Inputs that forward and backward share: members of the same names in both structs.
template <class Args>
struct Inputs {
  TensorView q, k, v;
  AttentionCall call;

  Inputs(const Args& args, const AttentionShape& shape, Device device)
      : q(view_of(args.q, 4, device, "q")), k(view_of(args.k, 4, device, "k")), v(view_of(args.v, 4, device, "v")) {
    require(args.dropout_stream <= std::numeric_limits<std::uint32_t>::max(), "dropout_stream is {}; it must be below 2^32",
            args.dropout_stream);
    call = {.layer = args.layer, .dropout_stream = args.dropout_stream, .batch_begin = args.batch_begin};
    call.bias = optional_view(args.bias, 4, device, "bias");
    call.sink = optional_view(args.sink, 1, device, "sink");
    require(!shape.bias || args.bias != nullptr, "the plan was made for a bias, the call brings none");
    require(!shape.sink || args.sink != nullptr, "the plan was made for a sink, the call brings none");
  }
};

// Where a result goes: of this shape, and of one of two types.
TensorView target(const dattn_tensor* tensor, const Shape& shape, DType type, DType other, Device device,
                  std::string_view name) {
  const TensorView view = view_of(tensor, shape.axes, device, name);
  require(view.shape == shape, "{} has shape {}; it must be {}", name, view.shape.text(), shape.text());
  require(view.dtype == type || view.dtype == other, "{} is {}; it must be {}{}", name, name_of(view.dtype), name_of(type),
          type == other ? "" : fmt::format(" or {}", name_of(other)));
  return view;
}

void deliver(const Tensor& from, const std::optional<TensorView>& to) {
  if (to && from.defined()) copy(from, *to);
}

Shape local_shape(const PlannedAttention& plan, std::int64_t width) {
  return {plan.problem().shape.batch, plan.attention.q_positions().count(), plan.attention.heads().q.count(), width};
}

Shape statistics_shape(const PlannedAttention& plan) {
  return {plan.problem().shape.batch, plan.attention.heads().q.count(), plan.attention.q_positions().count()};
}

void forward(PlannedAttention& plan, const dattn_forward& args) {
  const AttentionShape& shape = plan.problem().shape;
  const Device device = plan.device();
  const DType sums = accumulate_type(shape.dtype);
  const Inputs in(args, shape, device);
  const TensorView out = target(args.out, local_shape(plan, shape.dim_v), shape.dtype, shape.dtype, device, "out");
  std::optional<TensorView> lse;
  if (args.lse != nullptr) lse = target(args.lse, statistics_shape(plan), sums, sums, device, "lse");
  const CallerStream stream(device, args.stream);
  const AttentionResult result = plan.attention.forward(in.q, in.k, in.v, in.call);
  copy(result.out, out);
  deliver(result.lse, lse);
  stream.done();
}

void backward(PlannedAttention& plan, const dattn_backward& args) {
  const AttentionShape& shape = plan.problem().shape;
  const Device device = plan.device();
  const DType sums = accumulate_type(shape.dtype);
  const Inputs in(args, shape, device);
  const TensorView out = view_of(args.out, 4, device, "out"), dout = view_of(args.dout, 4, device, "dout");
  const TensorView lse = target(args.lse, statistics_shape(plan), sums, sums, device, "lse");
  const TensorView dq = target(args.dq, in.q.shape, shape.dtype, sums, device, "dq");
  const TensorView dk = target(args.dk, in.k.shape, shape.dtype, sums, device, "dk");
  const TensorView dv = target(args.dv, in.v.shape, shape.dtype, sums, device, "dv");
  std::optional<TensorView> dbias, dsink;
  if (args.dbias != nullptr && shape.bias) dbias = target(args.dbias, in.call.bias.shape, shape.dtype, sums, device, "dbias");
  if (args.dsink != nullptr && shape.sink) dsink = target(args.dsink, in.call.sink.shape, DType::kF32, sums, device, "dsink");
  const CallerStream stream(device, args.stream);
  const Tensor packed_lse = lse.contiguous() ? Tensor() : to_dtype(lse, lse.dtype);
  const AttentionResultView result(out, packed_lse.defined() ? packed_lse.view() : lse);
  const AttentionGradients gradients = plan.attention.backward(in.q, in.k, in.v, result, dout, in.call);
  copy(gradients.dq, dq);
  copy(gradients.dk, dk);
  copy(gradients.dv, dv);
  deliver(gradients.dbias, dbias);
  deliver(gradients.dsink, dsink);
  stream.done();
}

}  // namespace
}  // namespace dattn::c

using namespace dattn;
using namespace dattn::c;

struct dattn_plan {
  std::shared_ptr<PlannedAttention> held;
};

namespace {

template <class Body>
dattn_status on_plan(const dattn_plan* plan, const Body& body) noexcept {
  return guarded([&] {
    require_pointer(plan, "plan");
    const RankScope scope(*plan->held->mesh);
    body(*plan->held);
  });
}

// A call that all ranks make.
template <class Body>
dattn_status run_on_ranks(const dattn_plan* plan, const Body& body) noexcept {
  return guarded([&] {
    require_pointer(plan, "plan");
    Comm& comm = *plan->held->mesh->comm;
    collective(comm, [&] {
      if (plan->held->problem().invariant) comm.require_same_instructions();
      body();
    });
  });
}

}  // namespace

dattn_status dattn_plan_create(dattn_mesh* mesh, const dattn_attention_options* given, dattn_plan** plan) {
  return create(plan, "plan", [&] {
    require_pointer(mesh, "mesh");
    const RankScope scope(*mesh->held);
    const dattn_attention_options options = read_struct(given, "dattn_attention_options");
    const AttentionShape shape = shape_of(options);
    return std::make_shared<PlannedAttention>(
        PlannedAttention{mesh->held, ShardedAttention(mesh->held->mesh, shape, options_of(options, shape))});
  });
}

void dattn_plan_destroy(dattn_plan* plan) { delete plan; }

dattn_status dattn_plan_get_info(const dattn_plan* plan, dattn_plan_info* info) {
  return on_plan(plan, [&](const PlannedAttention& held) { write_struct(info_of(held), info, "dattn_plan_info"); });
}

dattn_status dattn_plan_explain(dattn_plan* plan, const char** text) {
  return on_plan(plan, [&](PlannedAttention& held) {
    require_pointer(text, "text");
    if (held.explanation.empty()) held.explanation = explain(held);
    *text = held.explanation.c_str();
  });
}

dattn_status dattn_plan_verify(dattn_plan* plan) {
  return on_plan(plan, [&](const PlannedAttention& held) {
    require_proved(held.attention.forward_plan(), "forward");
    require_proved(held.attention.backward_plan(), "backward");
  });
}

dattn_status dattn_plan_positions(const dattn_plan* plan, int32_t key_side, int64_t* positions, int64_t capacity) {
  return on_plan(plan, [&](const PlannedAttention& held) {
    write_positions(key_side != 0 ? held.attention.kv_positions() : held.attention.q_positions(), positions, capacity);
  });
}

dattn_status dattn_attention_forward(dattn_plan* plan, const dattn_forward* args) {
  return run_on_ranks(plan, [&] { forward(*plan->held, read_struct(args, "dattn_forward")); });
}

dattn_status dattn_attention_backward(dattn_plan* plan, const dattn_backward* args) {
  return run_on_ranks(plan, [&] { backward(*plan->held, read_struct(args, "dattn_backward")); });
}
