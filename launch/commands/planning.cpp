#include "launch/commands/planning.h"

#include <algorithm>

#include "core/nn/model_config.h"
#include "parallel/cost_model.h"
#include "parallel/rank_plan.h"
#include "parallel/strategy.h"

namespace dattn {

AttentionShape planned_shape(const RunConfig& config) {
  if (config.shape) return data_share(config, shape_of(*config.shape, config.dtype)).shape;
  const ModelConfig model = resolve(config.model);
  return {rows_at_a_time(config.train, config.mesh.data),
          config.train.seq_len,
          config.train.seq_len,
          model.heads,
          model.kv_heads,
          model.head_dim,
          model.head_dim,
          config.dtype};
}

std::optional<Machine> machine_of(const RunConfig& config) {
  if (config.machine.empty()) return std::nullopt;
  return load_machine(config.machine);
}

bool is_planned(const RunConfig& config) {
  const bool automatic = config.strategy == "auto" && determinism_of(config) != Determinism::kInvariant;
  return config.mesh.ranks || config.objective || automatic;
}

RunConfig with_choice(RunConfig config, const Candidate& chosen) {
  config.mesh.ranks.reset();
  config.mesh.ring = {chosen.mesh.size(Axis::kRing), chosen.mesh.size(Axis::kRingOuter)};
  config.mesh.rows = chosen.mesh.size(Axis::kRows);
  config.mesh.ulysses = chosen.mesh.size(Axis::kUlysses);
  config.strategy = chosen.strategy;
  config.layout = chosen.layout;
  config.objective.reset();
  config.machine.clear();
  return config;
}

RunConfig resolve_mesh(const RunConfig& config, const AttentionShape& shape) {
  if (is_planned(config)) {
    const std::optional<Machine> machine = machine_of(config);
    return with_choice(config, plan_attention(planner_request(config, shape, machine)).chosen);
  }
  RunConfig resolved = config;
  resolved.layout = config.layout.value_or(kDefaultLayout);
  return resolved;
}

RunConfig resolve_mesh(const RunConfig& config) {
  return is_planned(config) ? resolve_mesh(config, planned_shape(config)) : resolve_mesh(config, AttentionShape{});
}

TrainingMemory predicted_memory(const RunConfig& config, const Plan& forward, const Plan& gradient) {
  const int ranks = forward.problem->mesh.ranks();
  AttentionPeaks peaks;
  for (const int rank : sample(ranks, std::min(ranks, 32))) {
    peaks.forward = std::max(peaks.forward, make_rank_plan(forward, rank).cost.peak_memory);
    peaks.backward = std::max(peaks.backward, make_rank_plan(gradient, rank).cost.peak_memory);
  }
  return training_memory(config.model, config.train, forward.problem->mesh, config.dtype, determinism_of(config), peaks);
}

TrainingMemory predicted_memory(const RunConfig& config) {
  const AttentionShape shape = planned_shape(config);
  const Plan forward = make_plan(config.mesh.shape(), shape, attention_options(config, shape.seq_q, shape.seq_kv));
  return predicted_memory(config, forward, backward(forward));
}

}  // namespace dattn
