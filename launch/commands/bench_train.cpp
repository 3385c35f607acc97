// dattn bench train CONFIG: how fast a model trains on the present ranks. Tokens are random, so that no text is needed and the
// vocabulary is the config's; everything else is a training step as `dattn train` takes it.
#include "launch/commands/bench_train.h"

#include <memory>

#include "core/base/error.h"
#include "core/base/philox.h"
#include "core/base/threads.h"
#include "launch/commands/planning.h"
#include "launch/commands/timing.h"
#include "plugins/train/train_step.h"

namespace dattn {
namespace {

struct TrainBench {
  CommonOptions common;
  std::string config;
  int steps = 5;
};

// FLOPs of one step, forward and backward: 6 for each token and weight that is multiplied, and attention's 14 D for each
// visible pair (Chowdhery et al., "PaLM", 2022, appendix B; there causal masks count as full ones). What a recomputation
// repeats does not count.
double flops_of_step(const TrainJob& job, const ModelConfig& model) {
  const std::int64_t read_only = (model.tied ? 0 : model.vocab) + (model.position == "learned" ? model.max_seq : 0);
  const auto weights = static_cast<double>(count_parameters(model) - read_only * model.dim);
  const auto tokens = static_cast<double>(job.train.batch * job.train.seq_len);
  const std::int64_t seq = job.train.seq_len;
  const auto pairs = static_cast<double>(area(compile(to_mask(job.attention.mask, seq, seq), seq, seq)));
  return 6 * weights * tokens + 14 * pairs * static_cast<double>(job.train.batch * model.layers * model.heads * model.head_dim);
}

void bench_train(const TrainBench& bench, const RunConfig& config, Communicator& world) {
  const TrainJob job = train_job(config);
  require_trainable(job);
  const ModelConfig model = resolve(job.model);
  const auto counter = std::make_shared<ByteCounter>();
  const std::unique_ptr<Communicator> counting = counted(whole_group(world), counter);
  const Mesh mesh(*counting, job.mesh);
  const TensorMeter memory;
  TrainStep step(*counting, *counter, mesh, job, model);

  PeakTimer timer(world, job.dtype);
  Json done{{"event", "done"}, {"ranks", world.size()}, {"threads", num_threads()}};
  std::int64_t taken = 0;
  StepSums sums;
  const Percentiles time = timer.time(done, "", flops_of_step(job, model), bench.steps, [&] {
    const auto random_window = [&](std::int64_t row) {
      std::vector<std::int32_t> window(static_cast<std::size_t>(job.train.seq_len) + 1);
      const auto stream = static_cast<std::uint64_t>(taken * job.train.batch + row);
      for (std::size_t i = 0; i < window.size(); ++i) {
        const double share = philox_uniform(static_cast<std::uint64_t>(job.train.seed), stream, i);  // [0, 1)
        window[i] = static_cast<std::int32_t>(share * static_cast<double>(model.vocab));
      }
      return window;
    };
    sums = step.forward_backward(taken++, random_window);
    if (step.update(job.train.learning_rate, sums) == Update::kDiverged)
      fail(ErrorCode::kDiverged, "the model diverged on random tokens: loss {}; lower train.learning_rate", sums.loss);
  });
  done["tokens_per_s"] = static_cast<double>(job.train.batch * job.train.seq_len) / time.p50 * 1e3;
  done["milliseconds"] = time.json();
  done["loss"] = sums.loss;
  done["parameters"] = count_parameters(model);
  done["bytes_sent"] = sums.bytes + sums.update_bytes;
  timer.add_peaks(done);
  done["peak_memory_bytes"] = memory.peak();
  if (world.rank() == 0) print_line(bench.common.json ? done.dump() : done.dump(2));
}

}  // namespace

Command add_bench_train(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand("train", "training steps of a config's model, on random tokens");
  const auto options = std::make_shared<TrainBench>();
  command->add_option("config", options->config, "YAML file (keys: configs/SCHEMA.md)")->required();
  command->add_option("--steps", options->steps, "timed steps")->capture_default_str()->check(CLI::PositiveNumber);
  options->common.declare(*command, true);
  options->common.declare_trace(*command);
  return [options] {
    const auto load = [&] { return resolve_mesh(load_run_config(options->config, options->common)); };
    return run_with_config(options->common, load,
                           [&](const RunConfig& config, Communicator& world) { bench_train(*options, config, world); });
  };
}

}  // namespace dattn
