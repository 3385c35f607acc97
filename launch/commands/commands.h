// The subcommands of dattn. Each declares its options on the command line's parser and returns what to run once these
// are read. Rank 0 alone writes stdout; progress and logs go to stderr. With --json stdout holds JSON lines.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "launch/bootstrap.h"
#include "launch/run_config.h"
#include "parallel/report.h"

namespace dattn {

// Options that all subcommands share.
struct CommonOptions {
  bool json = false;
  std::vector<std::string> set;  // key=value
  int ranks = 0;
  int threads = 0;
  std::string trace;  // a file; empty: no trace

  void declare(CLI::App& command, bool with_config);
  void declare_trace(CLI::App& command);
};

void print_line(const std::string& line);  // on stdout, at once; called on rank 0 only
inline void print_json(const Json& event) { print_line(event.dump()); }

// The config with its overrides. Relative paths in the file are relative to it; those given by --set, to where the user
// stands.
RunConfig load_run_config(const std::string& path, const CommonOptions& common);

// Loads a config and runs the body as every rank of the job, traced if that is asked for. A config that cannot be loaded fails
// inside the job, so that of all ranks one says so.
int run_with_config(const CommonOptions& common, const std::function<RunConfig()>& load,
                    const std::function<void(const RunConfig&, Communicator&)>& body);

// A subcommand: add_NAME declares it and returns the function to run when it was chosen, which returns the exit code.
using Command = std::function<int()>;
Command add_train(CLI::App& app);
Command add_generate(CLI::App& app);
Command add_attention(CLI::App& app);
Command add_plan(CLI::App& app);
Command add_bench(CLI::App& app);
Command add_doctor(CLI::App& app);
Command add_mesh_ranks(CLI::App& app);  // hidden: how many ranks a command's mesh needs, for launch/run

// The config that a run folder's checkpoint was made with; --set changes it.
RunConfig run_folder_config(const std::string& path, const CommonOptions& common);

// Standard normal numbers, another set for each stream: what `bench` and `doctor` compute on.
Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t stream);

}  // namespace dattn
