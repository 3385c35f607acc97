// dattn mesh-ranks COMMAND ARGUMENTS..: how many ranks the mesh of a command's config needs. For launch/run.
#include <cstdio>
#include <memory>

#include "launch/commands/commands.h"

namespace dattn {

Command add_mesh_ranks(CLI::App& app) {
  CLI::App* command = app.add_subcommand("mesh-ranks", "")->group("");
  struct Options {
    CommonOptions common;
    std::string command, config;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("command", options->command)->required();
  command->add_option("config", options->config)->required();
  command->add_option("--set", options->common.set)->allow_extra_args(false);
  command->allow_extras();
  return [options] {
    const RunConfig config = options->command == "generate" ? run_folder_config(options->config, options->common)
                                                            : load_run_config(options->config, options->common);
    std::printf("%d\n", config.mesh.job_ranks());
    return 0;
  };
}

}  // namespace dattn
