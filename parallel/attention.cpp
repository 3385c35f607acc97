#include "parallel/attention.h"

#include <map>
#include <utility>

#include "core/attention/state.h"
#include "core/base/error.h"
#include "core/base/log.h"
#include "parallel/comm/trace.h"
#include "parallel/run.h"
#include "parallel/strategy.h"

namespace dattn {
namespace {

void check_tensor(std::string_view name, const TensorView& tensor, const Shape& expected, DType dtype) {
  require(tensor.shape == expected, "attention: {} has shape {} but this rank's shard is {}", name, tensor.shape.text(),
          expected.text());
  require(tensor.dtype == dtype, "attention: {} has dtype {} but the plan was made for {}", name, name_of(tensor.dtype),
          name_of(dtype));
  require(tensor.empty() || tensor.device == current_device(), "attention: {} is on {} but this rank computes on {}", name,
          to_text(tensor.device), to_text(current_device()));
  require(tensor.empty() || tensor.size(3) == 1 || tensor.stride(3) == 1,
          "attention: the last axis of {} must be contiguous, its stride is {}", name, tensor.stride(3));
}

Tensor owned_field(ValueData& value, std::size_t field) {
  return value.owned.empty() ? to_dtype(value.fields[field], value.fields[field].dtype) : std::move(value.owned[field]);
}

std::string memory_remedies(const Plan& plan) {
  std::string text = "more ranks on mesh.ring or mesh.ulysses hold less each";
  if (plan.strategy == "allgather" || plan.strategy == "grid_gather")
    text += ", strategy=ring on mesh.ring holds two blocks of keys instead of all";
  if (plan.problem->shape.dtype == DType::kF32) text += ", dtype=bf16 halves it";
  return text + ", a smaller batch lowers it";
}

// body(), whose device may run out of memory: the message then says what this rank's plan needs.
template <class Body>
auto within_memory(const Plan& plan, const RankPlan& mine, std::string_view what, const Body& body) {
  try {
    return body();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(fmt::format("{}; {} of attention holds {} bytes beside what it is given (strategy {}, mesh {}): {}",
                                  error.message(), what, mine.cost.peak_memory, plan.strategy, plan.problem->mesh.text(),
                                  memory_remedies(plan)));
  }
}

}  // namespace

struct ShardedAttention::Impl {
  Impl(const Mesh& on_mesh, const AttentionShape& with_shape, const AttentionOptions& options)
      : mesh(on_mesh),
        shape(with_shape),
        forward_plan(make_plan(on_mesh.shape(), with_shape, options)),
        backward_plan(dattn::backward(forward_plan)),
        forward_mine(make_rank_plan(forward_plan, on_mesh.rank())),
        backward_mine(make_rank_plan(backward_plan, on_mesh.rank())),
        kernel(select_kernel({with_shape.dtype, with_shape.dim_qk, with_shape.dim_v, current_device()})),
        forward_runner(forward_plan, forward_mine, on_mesh, kernel),
        backward_runner(backward_plan, backward_mine, on_mesh, kernel) {
    note_once(fmt::format("attention strategy {} on mesh {}", forward_plan.strategy, on_mesh.shape().text()));
    if (on_mesh.rank() == 0) tell_replaced_strategy(options, forward_plan);
  }

  const Block& q_block() const { return forward_mine.blocks[0]; }
  const Block& kv_block() const { return forward_mine.blocks[1]; }

  void check_inputs(const TensorView& q, const TensorView& k, const TensorView& v) const {
    check_tensor("q", q, {shape.batch, q_block().rows.count(), q_block().heads.q.count(), shape.dim_qk}, shape.dtype);
    check_tensor("k", k, {shape.batch, kv_block().rows.count(), kv_block().heads.kv.count(), shape.dim_qk}, shape.dtype);
    check_tensor("v", v, {shape.batch, kv_block().rows.count(), kv_block().heads.kv.count(), shape.dim_v}, shape.dtype);
  }

  void check_result(const AttentionResultView& result) const {
    const std::int64_t rows = q_block().rows.count(), heads = q_block().heads.q.count();
    check_tensor("out", result.out, {shape.batch, rows, heads, shape.dim_v}, shape.dtype);
    const Shape statistics{shape.batch, heads, rows};
    const DType type = accumulate_type(shape.dtype);
    require(result.lse.shape == statistics && result.lse.dtype == type && result.lse.contiguous(),
            "attention: lse is {} {}; it is contiguous {} {}", name_of(result.lse.dtype), result.lse.shape.text(),
            name_of(type), statistics.text());
  }

  // The fields of the plan's query value; checks what a call brings beside q, k and v.
  std::vector<TensorView> with_bias(const TensorView& q, const AttentionCall& call) const {
    const std::int64_t heads = q_block().heads.q.count();
    const auto agree = [](bool planned, const TensorView& brought, bool nothing_held, const char* name) {
      require(planned ? brought.data != nullptr || nothing_held : brought.data == nullptr,
              "attention: the plan was made {} {}, the call brings {}", planned ? "for a" : "without", name,
              planned ? "none" : "one");
    };
    agree(shape.sink, call.sink, heads == 0, "sink");
    agree(shape.bias.has_value(), call.bias, q.elements() == 0, "bias");
    if (call.sink.data != nullptr) {
      require(call.sink.shape == Shape({heads}) && call.sink.dtype == DType::kF32, "attention: sink is {} {}; it is fp32 {}",
              name_of(call.sink.dtype), call.sink.shape.text(), Shape({heads}).text());
    }
    if (!shape.bias) return {q};
    const Field field = fields_of(What::kQuery, shape)[1];
    check_tensor("bias", call.bias, field_shape(field, shape.batch, q_block().rows.count(), heads), shape.dtype);
    return {q, call.bias};
  }

  AttentionResult forward(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionCall& call) {
    check_inputs(q, k, v);
    std::vector<ValueData> outputs = forward_runner.run({with_bias(q, call), {k, v}}, call);
    Tensor lse = owned_field(outputs[0], 0);
    return {owned_field(outputs[0], 1), std::move(lse)};
  }

  AttentionGradients backward(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionResultView& result,
                              const TensorView& dout, const AttentionCall& call) {
    check_inputs(q, k, v);
    check_result(result);
    check_tensor("dout", dout, result.out.shape, shape.dtype);
    Tensor delta = Tensor::uninitialized(result.lse.dtype, result.lse.shape);
    attention_delta(dout, result.out, delta);
    std::vector<ValueData> outputs = backward_runner.run({with_bias(q, call), {k, v}, {result.lse, delta, dout}}, call);
    AttentionGradients gradients;
    gradients.dq = owned_field(outputs[0], 0);
    if (shape.bias) gradients.dbias = owned_field(outputs[0], 1);
    gradients.dk = owned_field(outputs[1], 0);
    gradients.dv = owned_field(outputs[1], 1);
    if (shape.sink) {
      gradients.dsink = Tensor(delta->dtype, {q_block().heads.q.count()});
      if (call.sink.data != nullptr) add_sink_gradient(result.lse, delta, call.sink, gradients.dsink);
    }
    return gradients;
  }

  const Mesh& mesh;
  AttentionShape shape;
  Plan forward_plan, backward_plan;
  RankPlan forward_mine, backward_mine;
  const AttentionKernel& kernel;
  Runner forward_runner, backward_runner;
};

ShardedAttention::ShardedAttention(const Mesh& mesh, const AttentionShape& shape, const AttentionOptions& options)
    : impl_(std::make_unique<Impl>(mesh, shape, options)) {}
ShardedAttention::~ShardedAttention() = default;
ShardedAttention::ShardedAttention(ShardedAttention&&) noexcept = default;

const Positions& ShardedAttention::q_positions() const { return impl_->q_block().rows; }
const Positions& ShardedAttention::kv_positions() const { return impl_->kv_block().rows; }
HeadRange ShardedAttention::heads() const { return impl_->q_block().heads; }

const Plan& ShardedAttention::forward_plan() const { return impl_->forward_plan; }
const Plan& ShardedAttention::backward_plan() const { return impl_->backward_plan; }
const RankPlan& ShardedAttention::forward_rank_plan() const { return impl_->forward_mine; }
const RankPlan& ShardedAttention::backward_rank_plan() const { return impl_->backward_mine; }

AttentionResult ShardedAttention::forward(const TensorView& q, const TensorView& k, const TensorView& v,
                                          const AttentionCall& call) {
  const WorkSpan span(impl_->mesh.world().trace(), {"forward", call.layer});
  return within_memory(impl_->forward_plan, impl_->forward_mine, "the forward pass",
                       [&] { return impl_->forward(q, k, v, call); });
}

AttentionGradients ShardedAttention::backward(const TensorView& q, const TensorView& k, const TensorView& v,
                                              const AttentionResultView& result, const TensorView& dout,
                                              const AttentionCall& call) {
  const WorkSpan span(impl_->mesh.world().trace(), {"backward", call.layer});
  return within_memory(impl_->backward_plan, impl_->backward_mine, "the backward pass",
                       [&] { return impl_->backward(q, k, v, result, dout, call); });
}

struct DistributedAttention::Impl {
  const Mesh& mesh;
  AttentionShape shape;
  AttentionOptions options;
  std::map<std::pair<std::int64_t, bool>, ShardedAttention> by_kind;  // batch size; whether dropout applies
  std::map<int, AttentionResult> saved;                               // by layer, until its backward

  ShardedAttention& at(const AttentionSite& site, std::int64_t batch) {
    const std::pair kind{batch, site.training && options.dropout > 0};
    const auto found = by_kind.find(kind);
    if (found != by_kind.end()) return found->second;
    AttentionShape with_batch = shape;
    with_batch.batch = batch;
    AttentionOptions chosen = options;
    if (!kind.second) chosen.dropout = 0;
    return by_kind.emplace(kind, ShardedAttention(mesh, with_batch, chosen)).first->second;
  }

  static AttentionCall call_of(const AttentionSite& site) {
    return {.layer = site.layer, .dropout_stream = site.dropout_stream, .batch_begin = site.batch_begin};
  }
};

DistributedAttention::DistributedAttention(const Mesh& mesh, const AttentionShape& shape, const AttentionOptions& options)
    : impl_(new Impl{mesh, shape, options, {}, {}}) {
  AttentionShape one = shape;
  one.batch = 1;
  make_plan(mesh.shape(), one, options);  // what is refused is refused here, before any work
}
DistributedAttention::~DistributedAttention() = default;

Tensor DistributedAttention::forward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v) {
  AttentionResult result = impl_->at(site, q.size(0)).forward(q, k, v, Impl::call_of(site));
  Tensor out = result.out.clone();
  impl_->saved[site.layer] = std::move(result);
  return out;
}

Attention::Gradients DistributedAttention::backward(const AttentionSite& site, const TensorView& q, const TensorView& k,
                                                    const TensorView& v, const TensorView& dout) {
  const auto saved = impl_->saved.find(site.layer);
  ensure(saved != impl_->saved.end(), "attention of layer {} has a backward without a forward", site.layer);
  AttentionGradients gradients = impl_->at(site, q.size(0)).backward(q, k, v, saved->second, dout, Impl::call_of(site));
  impl_->saved.erase(saved);
  return {std::move(gradients.dq), std::move(gradients.dk), std::move(gradients.dv)};
}

void DistributedAttention::drop(int layer) { impl_->saved.erase(layer); }

}  // namespace dattn
