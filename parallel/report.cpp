#include "parallel/report.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "parallel/cost_model.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

constexpr int kCountedRanks = 512;  // the costs of larger meshes are those of a sample,
constexpr int kSampledRanks = 32;   // of so many ranks

Json to_json(const Candidate& candidate) {
  Json json{{"strategy", candidate.strategy}};
  json["mesh"] = to_json(candidate.mesh);
  json["layout"] = name_of(candidate.layout);
  json["bytes_per_rank"] = {{"forward", std::llround(candidate.forward_bytes)},
                            {"backward", std::llround(candidate.backward_bytes)}};
  json["balance"] = candidate.balance;
  json["in_step"] = candidate.in_step;
  json["worked"] = candidate.worked;
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

Json to_json(const MeshShape& mesh) {
  Json json;
  for (const Axis axis : kAxes) json[std::string(name_of(axis))] = mesh.size(axis);
  return json;
}

Json plan_costs(const Plan& forward, const Plan& gradient) {
  const int ranks = forward.problem->mesh.ranks();
  const std::vector<int> counted = sample(ranks, ranks <= kCountedRanks ? ranks : kSampledRanks);
  const auto count = static_cast<double>(counted.size());
  Json bytes, bytes_max, stats;
  double flops_sum = 0, flops_max = 0;
  std::int64_t peak = 0;  // of the rank that holds most, inputs included
  for (const auto& [name, plan] : {std::pair{"forward", &forward}, std::pair{"backward", &gradient}}) {
    double sum = 0, statistics = 0;
    std::int64_t most = 0;
    for (const int rank : counted) {
      const RankPlan mine = make_rank_plan(*plan, rank);
      const RankCost& cost = mine.cost;
      sum += static_cast<double>(cost.bytes_received);
      statistics += static_cast<double>(cost.stats_bytes);
      most = std::max(most, cost.bytes_received);
      peak = std::max(peak, memory_with_inputs(*plan, mine));
      if (plan == &forward) flops_sum += mine.flops(), flops_max = std::max(flops_max, mine.flops());
    }
    bytes[name] = std::llround(sum / count);
    stats[name] = std::llround(statistics / count);
    bytes_max[name] = most;
  }
  Json costs{{"bytes_per_rank", bytes},
             {"bytes_max", bytes_max},
             {"stats_bytes", stats},
             {"flops_per_rank", flops_sum / count},
             {"balance", flops_max > 0 ? flops_sum / count / flops_max : 1.0},
             {"peak_memory_bytes", peak}};
  if (counted.size() < static_cast<std::size_t>(ranks)) costs["sampled_ranks"] = counted.size();
  return costs;
}

std::string explain(const Choice& choice) {
  const bool by_time = choice.objective == Objective::kTime;
  std::string text = fmt::format("by        {}\n", by_time ? "time on the machine" : "bytes received");
  text += fmt::format("best      {}\n          {}\n", choice.chosen.text(), costs_text(choice.chosen));
  text += fmt::format("          {:.3f} times the lower bound of {:.0f} bytes for full attention\n", choice.ratio,
                      choice.lower_bound_bytes);
  text += fmt::format("layout    {}: {}\n", name_of(choice.chosen.layout), choice.layout_reason);
  if (choice.runner_up)
    text += fmt::format("runner-up {}\n          {}\n", choice.runner_up->text(), costs_text(*choice.runner_up));
  for (const Rejected& one : choice.rejected) text += fmt::format("refused   {}: {}\n", one.what, one.why);
  return text;
}

Json to_json(const Choice& choice) {
  Json json{{"objective", choice.objective == Objective::kTime ? "time" : "bytes"},
            {"chosen", to_json(choice.chosen)},
            {"runner_up", choice.runner_up ? to_json(*choice.runner_up) : Json()},
            {"layout_reason", choice.layout_reason},
            {"layouts", Json::array()},
            {"rejected", Json::array()}};
  for (const Candidate& one : choice.layouts) {
    json["layouts"].push_back(
        {{"layout", name_of(one.layout)},
         {"bytes_per_rank", {{"forward", std::llround(one.forward_bytes)}, {"backward", std::llround(one.backward_bytes)}}},
         {"balance", one.balance},
         {"in_step", one.in_step},
         {"worked", one.worked},
         {"time_s", one.time_s > 0 ? Json(one.time_s) : Json()},
         {"simulated", one.simulated}});
  }
  for (const Rejected& one : choice.rejected) json["rejected"].push_back({{"what", one.what}, {"why", one.why}});
  return json;
}

}  // namespace dattn
