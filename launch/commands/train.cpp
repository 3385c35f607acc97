// dattn train CONFIG: trains a model and leaves a run folder.
#include <filesystem>
#include <memory>

#include <fmt/format.h>

#include "launch/commands/planning.h"
#include "plugins/train/trainer.h"

namespace dattn {

TrainJob train_job(const RunConfig& config) {
  TrainJob job;
  job.mesh = config.mesh.shape();
  job.attention = config.attention;
  job.layout = config.layout.value_or(kDefaultLayout);
  job.strategy = config.strategy;
  job.determinism = determinism_of(config);
  job.dtype = config.dtype;
  job.data = config.data;
  job.model = config.model;
  job.train = config.train;
  return job;
}

Command add_train(CLI::App& app) {
  CLI::App* command = app.add_subcommand("train", "train a transformer whose attention is sharded over the mesh");
  struct Options {
    CommonOptions common;
    std::string config;
    bool resume = false;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("config", options->config, "YAML file (keys: configs/SCHEMA.md)")->required();
  command->add_flag("--resume", options->resume, "continue the newest checkpoint of the run folder instead of starting afresh");
  options->common.declare(*command, true);
  options->common.declare_trace(*command);
  return [options] {
    const auto load = [&] { return resolve_mesh(load_run_config(options->config, options->common)); };
    return run_with_config(options->common, load, [&](const RunConfig& config, Communicator& world) {
      TrainJob job = train_job(config);
      job.name = std::filesystem::path(options->config).stem().string();
      job.config_yaml = to_yaml(to_node(config));
      job.resume = options->resume;
      TrainHooks hooks;
      if (options->common.json) hooks.on_event = print_line;
      const TrainResult result = [&] {
        try {
          return train(world, job, hooks);
        } catch (const OutOfMemory& error) {
          const std::string predicted = text_of(predicted_memory(config), config.train.recompute);
          throw OutOfMemory(fmt::format("{}; {}. {}", error.message(), predicted, memory_remedies()));
        }
      }();
      if (world.rank() == 0 && !options->common.json) print_line(result.run_dir);
    });
  };
}

}  // namespace dattn
