#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>

#include "core/attention/kernel.h"
#include "core/base/file.h"
#include "core/base/log.h"
#include "core/base/philox.h"
#include "launch/commands/commands.h"
#include "parallel/comm/decorators.h"

namespace dattn {
namespace {

// Runs the body on a traced world and writes the traces of all ranks into one file.
void run_traced(const std::string& path, Communicator& world, const std::function<void(Communicator&)>& body) {
  world.barrier({"trace"});
  const auto trace = std::make_shared<Trace>(world.rank());
  const std::unique_ptr<Communicator> traced_world = traced(whole_group(world), trace);
  body(*traced_world);
  const std::vector<std::string> events = world.gather_strings(trace->json_events(), {"trace"});
  if (world.rank() == 0) write_file(path, trace_file(events));
}

// What the ranks of CUDA devices do otherwise than a user may think; all do alike, and rank 0 says so.
void tell_choices(const RunConfig& config) {
  if (!config.determinism) {
    note_once(
        "determinism is off, as always on CUDA devices where the config does not ask for it: results may differ in their last "
        "bits from run to run; determinism=repeatable keeps them, more slowly",
        LogLevel::kInfo);
  }
  const char* forced = std::getenv("DATTN_KERNEL");
  if (!is_half(config.dtype) || (forced != nullptr && *forced != '\0')) return;
  const Support cudnn = find_kernel("cudnn", current_device()).supports({config.dtype, 64, 64, current_device()});
  if (!cudnn.ok) note_once("attention without cuDNN, by kernel cuda, which is slower: " + cudnn.why, LogLevel::kInfo);
}

}  // namespace

void CommonOptions::declare(CLI::App& command, bool with_config) {
  command.add_flag("--json", json, "JSON lines on stdout, each with an `event`");
  if (with_config)
    command.add_option("--set", set, "key=value: changes a key of the config; may be repeated")->allow_extra_args(false);
  command.add_option("--ranks", ranks, "run this many ranks as threads of one process")->check(CLI::PositiveNumber);
  command.add_option("--threads", threads, "threads per rank (default: cores / ranks on this machine)")
      ->check(CLI::PositiveNumber);
}

void CommonOptions::declare_trace(CLI::App& command) {
  command
      .add_option("--trace", trace,
                  "write what every rank computed, sent and waited for to FILE, for Perfetto (ui.perfetto.dev), as dattn plan "
                  "--timeline writes it of a simulation")
      ->type_name("FILE");
}

void print_line(const std::string& line) {
  std::puts(line.c_str());
  std::fflush(stdout);
}

RunConfig load_run_config(const std::string& path, const CommonOptions& common) {
  RunConfig config = load_config<RunConfig>(path, common.set);
  const std::filesystem::path folder = std::filesystem::absolute(path).parent_path();
  for (const auto& [key, file] : {std::pair{"data.path=", &config.data.path}, std::pair{"machine=", &config.machine}}) {
    const auto sets = [key = std::string_view(key)](const std::string& set) { return set.rfind(key, 0) == 0; };
    if (file->empty() || std::any_of(common.set.begin(), common.set.end(), sets)) continue;
    *file = (folder / *file).lexically_normal().string();
  }
  return config;
}

int run_with_config(const CommonOptions& common, const std::function<RunConfig()>& load,
                    const std::function<void(const RunConfig&, Communicator&)>& body) {
  RunConfig config;
  std::exception_ptr failure;
  try {
    config = load();
  } catch (...) {
    failure = std::current_exception();
  }
  const JobOptions options{common.ranks,
                           config.comm.timeout_s,
                           common.threads > 0 ? common.threads : config.threads,
                           {config.device, config.ranks_per_device, config.comm.transfers,
                            config.determinism.value_or(Determinism::kOff) != Determinism::kOff, config.tf32, config.comm.nccl,
                            config.determinism == Determinism::kInvariant || config.strategy == "invariant"}};
  return run_job(options, [&](Communicator& world) {
    if (failure) std::rethrow_exception(failure);
    if (current_device().is_cuda() && world.rank() == 0) tell_choices(config);
    if (common.trace.empty()) return body(config, world);
    run_traced(common.trace, world, [&](Communicator& traced_world) { body(config, traced_world); });
  });
}

Tensor random_tensor(DType dtype, const Shape& shape, std::uint64_t stream) {
  const Device wanted = current_device();
  const DeviceScope host(Device{});
  Tensor tensor = Tensor::uninitialized(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i)
    tensor.ptr<float>()[i] = philox_normal(1, stream, static_cast<std::uint64_t>(i));
  Tensor made = to_dtype(tensor, dtype);
  return wanted.is_cuda() ? to_device(made, wanted) : std::move(made);
}

}  // namespace dattn
