// dattn plan CONFIG: what an attention call of this config does on every rank, and why it was planned so, without running it.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>

#include <fmt/format.h>

#include "core/base/error.h"
#include "launch/commands/planning.h"
#include "launch/commands/simulate.h"
#include "parallel/lower_bound.h"
#include "parallel/rank_plan.h"
#include "parallel/simulate.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"

namespace dattn {
namespace {

constexpr int kTabledRanks = 16;  // of larger meshes only the ranks asked for are printed

// What runs, and what the planner says about it.
struct Planned {
  Plan forward, gradient;
  Choice choice;  // what runs, where the planner was asked to choose; else what it would have taken
  bool is_choice = false;
  double time_s = 0;  // forward and backward
  bool simulated = false;
  double planning_s = 0;
};

Planned plan_config(const RunConfig& config) {
  const auto start = std::chrono::steady_clock::now();
  const AttentionShape shape = planned_shape(config);
  const std::optional<Machine> machine = machine_of(config);
  PlanRequest request = planner_request(config, shape, machine);
  AttentionOptions options = request.options;
  Planned planned;
  planned.is_choice = is_planned(config);
  if (!planned.is_choice) {
    request.options.strategy = "auto";
    request.memory_bytes = 0;
  }
  planned.choice = plan_attention(request);
  MeshShape mesh = request.mesh;
  if (planned.is_choice) {
    const Candidate& chosen = planned.choice.chosen;
    mesh = chosen.mesh;
    options.strategy = chosen.strategy;
    options.layout = chosen.layout;
    planned.time_s = chosen.time_s;
    planned.simulated = chosen.simulated;
  }
  planned.planning_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  planned.forward = make_plan(mesh, shape, options);
  planned.gradient = backward(planned.forward);
  tell_replaced_strategy(options, planned.forward);
  if (planned.is_choice || !machine) return planned;
  planned.simulated = quick_to_simulate(shape, mesh.ranks());
  planned.time_s = planned.simulated ? simulated_time(planned.forward, planned.gradient, *machine)
                                     : assess(request, mesh, planned.forward.strategy).time_s;
  return planned;
}

std::size_t tiles_of(const RankStep& step) {
  std::size_t count = 0;
  for (const BatchTiles& part : step.tiles()) count += part.tiles.size();
  return count;
}

std::string rank_table(const Plan& plan, int rank) {
  const RankPlan mine = make_rank_plan(plan, rank);
  std::string lines =
      fmt::format("rank {}: queries {}, heads [{}, {}), {:.3f} GFLOP, receives {} bytes and {} of statistics, peak {} bytes\n",
                  rank, mine.blocks[0].rows.text(), mine.blocks[0].heads.q.begin, mine.blocks[0].heads.q.end,
                  mine.flops() * 1e-9, mine.cost.bytes_received, mine.cost.stats_bytes, mine.cost.peak_memory);
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    const RankStep& part = mine.steps[i];
    lines += fmt::format("  {:4} {:<15} {:<8}", i, name_of(step.verb),
                         plan.value_name(step.out[0] != kNoValue ? step.out[0] : step.out[1]));
    if (is_move(step.verb)) {
      std::string from;
      for (const Piece& piece : part.receives) {
        const int source = plan.problem->mesh.neighbour(rank, step.axis, piece.peer);
        const std::string name = fmt::format(" {}", source);
        if (source != rank && from.find(name) == std::string::npos) from += name;
      }
      lines += fmt::format(" over {}, from{}\n", name_of(step.axis), from.empty() ? " none" : from);
    } else if (!part.tiles().empty() || step.verb == Verb::kAttend || step.verb == Verb::kAttendGrad) {
      lines += fmt::format(" {} tiles, {:.0f} pairs\n", tiles_of(part), area(part.tiles()));
    } else {
      lines += "\n";
    }
  }
  return lines;
}

Json steps_json(const Plan& plan) {
  Json steps = Json::array();
  for (const Step& step : plan.steps) {
    Json in = Json::array(), out = Json::array();
    for (const ValueId value : step.in) in.push_back(plan.value_name(value));
    for (const ValueId value : step.out) out.push_back(plan.value_name(value));
    Json one{{"verb", name_of(step.verb)}, {"in", in}, {"out", out}};
    if (is_move(step.verb)) one["axis"] = name_of(step.axis);
    if (step.verb == Verb::kRotate) one["shift"] = step.shift;
    steps.push_back(one);
  }
  return steps;
}

// Proves both plans; throws with the problems found.
Json prove(const Plan& forward, const Plan& gradient) {
  require_proved(forward, "forward");
  const double pairs = require_proved(gradient, "backward").pairs;
  return pairs < 0x1p53 ? Json(std::llround(pairs)) : Json(pairs);  // beyond that no double tells one more
}

// What plans are judged by; bytes_per_rank is in `costs` already.
void add_judgement(const Planned& planned, Json& costs) {
  const Problem& problem = *planned.forward.problem;
  const double least = lower_bound_bytes(problem.shape, problem.mesh);
  costs["lower_bound_bytes"] = std::llround(least);
  costs["ratio"] = ratio_over(costs["bytes_per_rank"]["forward"].get<double>(), least);
  costs["time_s"] = planned.time_s > 0 ? Json(planned.time_s) : Json();
  if (planned.time_s > 0) costs["time_by"] = planned.simulated ? "simulation" : "estimate";
  costs["planning_s"] = planned.planning_s;
}

// What training this model holds on a rank, for a config that trains one: into `costs`, and as a line for people.
std::string add_training_memory(const RunConfig& config, const Planned& planned, const SimulateOptions& simulation,
                                Json& costs) {
  if (config.shape) return {};
  const TrainingMemory memory = predicted_memory(config, planned.forward, planned.gradient);
  Json& json = costs["training_memory"];
  json = {{"parameters_held", memory.parameters},  {"weights_bytes", memory.weights},
          {"gradients_bytes", memory.gradients},   {"optimizer_bytes", memory.optimizer},
          {"activations_kept_bytes", memory.kept}, {"working_bytes", memory.working},
          {"total_bytes", memory.total()},         {"recompute", name_of(config.train.recompute)}};
  std::string text = text_of(memory, config.train.recompute);
  if (simulation.wanted()) {
    const bool fits = memory.total() <= load_machine(simulation.machine).memory_bytes;
    json["fits_memory"] = fits;
    if (!fits) text += fmt::format(". That does not fit: {}", memory_remedies());
  }
  return text;
}

void print_text(const Planned& planned, const Json& costs, const std::optional<int>& rank) {
  const Problem& problem = *planned.forward.problem;
  fmt::print("strategy {}, mesh {}, layout {}, mask {}\n\n", planned.forward.strategy, problem.mesh.text(),
             name_of(problem.layout), problem.mask_text);
  fmt::print("{}\n{}\n", planned.is_choice ? "planned" : "as given; on this mesh the planner would take",
             explain(planned.choice));
  fmt::print("forward\n{}\nbackward\n{}\n", planned.forward.text(), planned.gradient.text());
  const int ranks = problem.mesh.ranks();
  if (rank) {
    fmt::print("{}\n", rank_table(planned.forward, *rank));
  } else if (ranks <= kTabledRanks) {
    for (int each = 0; each < ranks; ++each) fmt::print("{}", rank_table(planned.forward, each));
    fmt::print("\n");
  }
  for (const auto& [key, value] : costs.items()) fmt::print("{:<18} {}\n", key, value.dump());
}

}  // namespace

Command add_plan(CLI::App& app) {
  CLI::App* command = app.add_subcommand("plan", "the steps, bytes, FLOPs and balance of every rank");
  struct Options {
    CommonOptions common;
    std::string config;
    bool verify = false;
    std::optional<int> rank;
    SimulateOptions simulation;
  };
  const auto options = std::make_shared<Options>();
  command
      ->add_option("config", options->config, "YAML file with mesh, layout, strategy, attention and shape (or model and train)")
      ->required();
  command->add_flag("--verify", options->verify,
                    "prove that every visible pair is attended exactly once, and all that follows");
  command->add_option("--rank", options->rank, "print the steps of this rank (default: of all, up to 16)")
      ->check(CLI::NonNegativeNumber);
  options->simulation.declare(*command);
  options->common.declare(*command, true);
  return [options] {
    const RunConfig config = load_run_config(options->config, options->common);
    const Planned planned = plan_config(config);
    const Plan &forward = planned.forward, &gradient = planned.gradient;
    const Problem& problem = *forward.problem;
    require(!options->rank || *options->rank < problem.mesh.ranks(), "--rank {}: the mesh has {} ranks, numbered from 0",
            options->rank.value_or(0), problem.mesh.ranks());
    Json costs = plan_costs(forward, gradient);
    const std::string training = add_training_memory(config, planned, options->simulation, costs);
    if (options->simulation.wanted() && !options->common.json) {
      if (options->verify) prove(forward, gradient);
      print_simulation(simulate_plans(options->simulation, forward, gradient), forward);
      if (!training.empty()) print_line(training);
      return 0;
    }
    add_judgement(planned, costs);
    if (options->verify) {
      costs["verified_pairs"] = prove(forward, gradient);
      costs["verified"] = true;
    }
    if (options->simulation.wanted()) costs["simulate"] = simulate_plans(options->simulation, forward, gradient);
    if (!options->common.json) {
      print_text(planned, costs, options->rank);
      if (!training.empty()) print_line(training);
      return 0;
    }
    Json done{
        {"event", "done"}, {"strategy", forward.strategy}, {"layout", name_of(problem.layout)}, {"mask", problem.mask_text}};
    done["mesh"] = to_json(problem.mesh);
    done.update(costs);
    Json said = to_json(planned.choice);
    done["rejected"] = said["rejected"];
    said.erase("rejected");
    done[planned.is_choice ? "planned" : "planner_prefers"] = said;
    done["steps"] = {{"forward", steps_json(forward)}, {"backward", steps_json(gradient)}};
    print_json(done);
    return 0;
  };
}

}  // namespace dattn
