#include "launch/commands/planning.h"

#include <cmath>

#include <fmt/format.h>

#include "core/nn/model_config.h"

namespace dattn {
namespace {

Json to_json(const Candidate& candidate) {
  Json json{{"strategy", candidate.strategy}};
  for (const Axis axis : kAxes) json["mesh"][std::string(name_of(axis))] = candidate.mesh.size(axis);
  json["layout"] = name_of(candidate.layout);
  json["bytes_per_rank"] = {{"forward", std::llround(candidate.forward_bytes)},
                            {"backward", std::llround(candidate.backward_bytes)}};
  json["balance"] = candidate.balance;
  json["peak_memory_bytes"] = candidate.peak_memory;
  json["time_s"] = candidate.time_s > 0 ? Json(candidate.time_s) : Json();
  json["simulated"] = candidate.simulated;
  return json;
}

std::string costs_text(const Candidate& candidate) {
  std::string text = fmt::format("{:.0f} bytes a rank forward, {:.0f} backward, balance {:.3f}, {} bytes of memory",
                                 candidate.forward_bytes, candidate.backward_bytes, candidate.balance, candidate.peak_memory);
  if (candidate.time_s > 0)
    text += fmt::format(", {:.4g} ms {}", candidate.time_s * 1e3, candidate.simulated ? "simulated" : "estimated");
  return text;
}

}  // namespace

AttentionShape planned_shape(const RunConfig& config) {
  if (config.shape) return shape_of(*config.shape, config.dtype);
  const ModelConfig model = resolve(config.model);
  const std::int64_t batch = split_evenly(config.train.batch, config.mesh.data, 0).count();
  return {batch,          config.train.seq_len, config.train.seq_len, model.heads,
          model.kv_heads, model.head_dim,       model.head_dim,       config.dtype};
}

std::optional<Machine> machine_of(const RunConfig& config) {
  if (config.machine.empty()) return std::nullopt;
  return load_machine(config.machine);
}

bool is_planned(const RunConfig& config) { return config.mesh.ranks || config.objective; }

PlanRequest plan_request(const RunConfig& config, const AttentionShape& shape, const std::optional<Machine>& machine) {
  PlanRequest request;
  request.shape = shape;
  request.options = attention_options(config, shape.seq_q, shape.seq_kv);
  request.options.mask = batch_slice(request.options.mask, {0, shape.batch});
  request.mesh = config.mesh.axes();
  request.ranks = config.mesh.ranks;
  request.fixed_layout = config.layout.has_value();
  request.objective = config.objective.value_or(machine ? Objective::kTime : Objective::kBytes);
  if (machine) {
    request.machine = &*machine;
    request.memory_bytes = machine->memory_bytes;
  }
  return request;
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
    return with_choice(config, plan_attention(plan_request(config, shape, machine)).chosen);
  }
  RunConfig resolved = config;
  resolved.layout = config.layout.value_or(kDefaultLayout);
  return resolved;
}

RunConfig resolve_mesh(const RunConfig& config) {
  return is_planned(config) ? resolve_mesh(config, planned_shape(config)) : resolve_mesh(config, AttentionShape{});
}

std::string explain(const Choice& choice) {
  std::string text = fmt::format("best      {}\n          {}\n", choice.chosen.text(), costs_text(choice.chosen));
  text += fmt::format("          {:.3f} times the lower bound of {:.0f} bytes for full attention\n", choice.ratio,
                      choice.lower_bound_bytes);
  if (choice.runner_up)
    text += fmt::format("runner-up {}\n          {}\n", choice.runner_up->text(), costs_text(*choice.runner_up));
  for (const Rejected& one : choice.rejected) text += fmt::format("refused   {}: {}\n", one.what, one.why);
  return text;
}

Json to_json(const Choice& choice) {
  Json json{{"chosen", to_json(choice.chosen)},
            {"runner_up", choice.runner_up ? to_json(*choice.runner_up) : Json()},
            {"rejected", Json::array()}};
  for (const Rejected& one : choice.rejected) json["rejected"].push_back({{"what", one.what}, {"why", one.why}});
  return json;
}

}  // namespace dattn
