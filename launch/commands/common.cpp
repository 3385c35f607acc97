#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>

#include "core/base/philox.h"
#include "launch/commands/commands.h"
#include "parallel/cost_model.h"
#include "parallel/rank_plan.h"

namespace dattn {
namespace {

constexpr int kCountedRanks = 512;  // the costs of larger meshes are those of a sample,
constexpr int kSampledRanks = 32;   // of so many ranks

}  // namespace

void CommonOptions::declare(CLI::App& command, bool with_config) {
  command.add_flag("--json", json, "JSON lines on stdout, each with an `event`");
  if (with_config)
    command.add_option("--set", set, "key=value: changes a key of the config; may be repeated")->allow_extra_args(false);
  command.add_option("--ranks", ranks, "run this many ranks as threads of one process")->check(CLI::PositiveNumber);
  command.add_option("--threads", threads, "threads per rank (default: cores / ranks on this machine)")
      ->check(CLI::PositiveNumber);
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
                            config.determinism.value_or(Determinism::kOff) != Determinism::kOff}};
  return run_job(options, [&](Communicator& world) {
    if (failure) std::rethrow_exception(failure);
    body(config, world);
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

Json plan_costs(const Plan& forward, const Plan& gradient) {
  const int ranks = forward.problem->mesh.ranks();
  const std::vector<int> counted = sample(ranks, ranks <= kCountedRanks ? ranks : kSampledRanks);
  const auto count = static_cast<double>(counted.size());
  Json bytes, bytes_max, stats;
  double flops_sum = 0, flops_max = 0;
  std::int64_t peak = 0;
  for (const auto& [name, plan] : {std::pair{"forward", &forward}, std::pair{"backward", &gradient}}) {
    double sum = 0, statistics = 0;
    std::int64_t most = 0;
    for (const int rank : counted) {
      const RankCost cost = make_rank_plan(*plan, rank).cost;
      sum += static_cast<double>(cost.bytes_received);
      statistics += static_cast<double>(cost.stats_bytes);
      most = std::max(most, cost.bytes_received);
      peak = std::max(peak, cost.peak_memory);
      if (plan == &forward) flops_sum += cost.flops, flops_max = std::max(flops_max, cost.flops);
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

}  // namespace dattn
