// dattn plan CONFIG: what an attention call of this config does on every rank, without running it.
#include <cstdio>
#include <memory>

#include <fmt/format.h>

#include "core/base/error.h"
#include "launch/commands/commands.h"
#include "launch/commands/simulate.h"
#include "parallel/rank_plan.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"

namespace dattn {
namespace {

// Sizes of the call: the config's `shape`, or those of the model that it trains.
AttentionShape planned_shape(const RunConfig& config) {
  if (config.shape) return shape_of(*config.shape, config.dtype);
  const ModelConfig model = resolve(config.model);
  const std::int64_t batch = split_evenly(config.train.batch, config.mesh.data, 0).count();
  return {batch,          config.train.seq_len, config.train.seq_len, model.heads,
          model.kv_heads, model.head_dim,       model.head_dim,       config.dtype};
}

std::size_t tiles_of(const RankStep& step) {
  std::size_t count = 0;
  for (const BatchTiles& part : step.tiles) count += part.tiles.size();
  return count;
}

std::string rank_table(const Plan& plan, int rank) {
  const RankPlan mine = make_rank_plan(plan, rank);
  std::string lines =
      fmt::format("rank {}: queries {}, heads [{}, {}), {:.3f} GFLOP, receives {} bytes and {} of statistics, peak {} bytes\n",
                  rank, mine.blocks[0].rows.text(), mine.blocks[0].heads.q.begin, mine.blocks[0].heads.q.end,
                  mine.cost.flops * 1e-9, mine.cost.bytes_received, mine.cost.stats_bytes, mine.cost.peak_memory);
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
    } else if (!part.tiles.empty() || step.verb == Verb::kAttend || step.verb == Verb::kAttendGrad) {
      lines += fmt::format(" {} tiles, {} pairs\n", tiles_of(part), area(part.tiles));
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
  Json pairs;
  for (const auto& [name, plan] : {std::pair{"forward", &forward}, std::pair{"backward", &gradient}}) {
    const Verdict verdict = verify(*plan);
    std::string all;
    for (const std::string& problem : verdict.problems) all += "\n  " + problem;
    ensure(verdict.ok(), "the {} plan of strategy {} is wrong:{}", name, plan->strategy, all);
    pairs = verdict.pairs;
  }
  return pairs;
}

void print_text(const Plan& forward, const Plan& gradient, const Json& costs) {
  const Problem& problem = *forward.problem;
  fmt::print("strategy {}, mesh {}, layout {}, mask {}\n\nforward\n{}\nbackward\n{}\n", forward.strategy, problem.mesh.text(),
             name_of(problem.layout), problem.mask_text, forward.text(), gradient.text());
  for (int rank = 0; rank < problem.mesh.ranks(); ++rank) fmt::print("{}", rank_table(forward, rank));
  fmt::print("\n");
  for (const auto& [key, value] : costs.items()) fmt::print("{:<18} {}\n", key, value.dump());
}

}  // namespace

Command add_plan(CLI::App& app) {
  CLI::App* command = app.add_subcommand("plan", "the steps, bytes, FLOPs and balance of every rank");
  struct Options {
    CommonOptions common;
    std::string config;
    bool verify = false;
    SimulateOptions simulation;
  };
  const auto options = std::make_shared<Options>();
  command
      ->add_option("config", options->config, "YAML file with mesh, layout, strategy, attention and shape (or model and train)")
      ->required();
  command->add_flag("--verify", options->verify,
                    "prove that every visible pair is attended exactly once, and all that follows");
  options->simulation.declare(*command);
  options->common.declare(*command, true);
  return [options] {
    const RunConfig config = load_run_config(options->config, options->common);
    const AttentionShape shape = planned_shape(config);
    const Plan forward = make_plan(config.mesh.shape(), shape, attention_options(config, shape.seq_q, shape.seq_kv));
    const Plan gradient = backward(forward);
    if (options->simulation.wanted() && !options->common.json) {
      if (options->verify) prove(forward, gradient);
      print_simulation(simulate_plans(options->simulation, forward, gradient), forward);
      return 0;
    }
    Json costs = plan_costs(forward, gradient);
    if (options->verify) {
      costs["verified_pairs"] = prove(forward, gradient);
      costs["verified"] = true;
    }
    if (options->simulation.wanted()) costs["simulate"] = simulate_plans(options->simulation, forward, gradient);
    if (!options->common.json) {
      print_text(forward, gradient, costs);
      return 0;
    }
    Json done{{"event", "done"},
              {"strategy", forward.strategy},
              {"layout", name_of(config.layout)},
              {"mask", forward.problem->mask_text}};
    for (const Axis axis : kAxes) done["mesh"][std::string(name_of(axis))] = forward.problem->mesh.size(axis);
    done.update(costs);
    done["steps"] = {{"forward", steps_json(forward)}, {"backward", steps_json(gradient)}};
    print_json(done);
    return 0;
  };
}

}  // namespace dattn
