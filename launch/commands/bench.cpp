// dattn bench attention | product | comm: how fast attention and matrix products run on the present ranks, and what the axes of
// a mesh carry.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "core/attention/cpu/peak.h"
#include "core/base/error.h"
#include "core/base/threads.h"
#include "core/device/stream.h"
#include "core/nn/matmul.h"
#include "launch/commands/planning.h"
#include "parallel/attention.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

struct Percentiles {
  double p20, p50, p80;
  Json json() const { return {{"p20", p20}, {"p50", p50}, {"p80", p80}}; }
};

// Milliseconds of `repeat` calls, each started together on all ranks and counted until the last has ended.
template <class Body>
Percentiles time_calls(Communicator& world, int repeat, const Body& body) {
  std::vector<double> times;
  body();  // warms up: plans, memory pages, kernels
  current_stream().synchronize();
  for (int i = 0; i < repeat; ++i) {
    world.barrier({"bench"});
    const auto start = Clock::now();
    body();
    current_stream().synchronize();
    world.barrier({"bench"});
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times[static_cast<std::size_t>(std::lround(share * static_cast<double>(times.size() - 1)))];
  };
  return {at(0.2), at(0.5), at(0.8)};
}

// The sum over all ranks, each of which measures at the same time.
template <class Body>
double on_all_ranks(Communicator& world, const Body& body) {
  world.barrier({"bench"});
  Tensor sum(DType::kF64, {1}, Device::cpu());
  sum.ptr<double>()[0] = body();
  world.all_reduce_sum(sum, {"bench"});
  return sum.ptr<double>()[0];
}

// What processors do at most, before the calls that are judged by it and after them: where it moved, so did their times.
class PeakOfRanks {
 public:
  PeakOfRanks(Communicator& world, DType storage) : world_(world), storage_(storage), before_(measure()) {}
  void add_to(Json& done) {
    const double after = measure(), peak = std::max(before_, after);
    done["peak_gflops"] = peak;
    done["peak_gflops_before_after"] = {before_, after};
    for (const char* pass : {"forward", "backward"}) {
      const auto gflops = done.find(fmt::format("{}_gflops", pass));
      if (gflops != done.end()) done[fmt::format("{}_of_peak", pass)] = gflops->get<double>() / peak;
    }
  }

 private:
  double measure() const {
    return on_all_ranks(world_, [this] { return peak_flops(storage_) * 1e-9; });
  }
  Communicator& world_;
  DType storage_;
  double before_;
};

struct AttentionBench {
  CommonOptions common;
  ShapeConfig shape;
  std::string dtype = "fp32", mask = "causal";
  std::vector<std::string> mesh;  // axis=size
  bool backward = false;
  int repeat = 5;
};

// The command's own options as a config, so that --mesh and --mask are checked as a file's keys are.
RunConfig config_of(const AttentionBench& bench) {
  std::vector<std::string> set{"attention.mask.kind=" + bench.mask, "dtype=" + bench.dtype};
  for (const std::string& axis : bench.mesh) set.push_back("mesh." + axis);
  set.insert(set.end(), bench.common.set.begin(), bench.common.set.end());
  return parse_config_as<RunConfig>("{}", "dattn bench", set);
}

void bench_attention(const AttentionBench& bench, const RunConfig& config, Communicator& world) {
  const AttentionShape shape = shape_of(bench.shape, config.dtype);
  const Mesh mesh(world, config.mesh.shape());
  const AttentionOptions options = attention_options(config, shape.seq_q, shape.seq_kv);
  ShardedAttention attention(mesh, shape, options);
  const std::int64_t rows = attention.q_positions().count(), keys = attention.kv_positions().count();
  const HeadRange heads = attention.heads();
  const TensorMeter memory;
  const Tensor q = random_tensor(shape.dtype, {shape.batch, rows, heads.q.count(), shape.dim_qk}, 1);
  const Tensor k = random_tensor(shape.dtype, {shape.batch, keys, heads.kv.count(), shape.dim_qk}, 2);
  const Tensor v = random_tensor(shape.dtype, {shape.batch, keys, heads.kv.count(), shape.dim_v}, 3);
  const Tensor dout = random_tensor(shape.dtype, {shape.batch, rows, heads.q.count(), shape.dim_v}, 4);

  // Of a GPU no such figure is measured here: see its maker's, or `bench product`.
  const bool on_cpu = !current_device().is_cuda();
  std::optional<PeakOfRanks> peak;
  if (on_cpu) peak.emplace(world, shape.dtype);
  AttentionResult result;
  const Percentiles forward = time_calls(world, bench.repeat, [&] { result = attention.forward(q, k, v); });
  const double pairs = static_cast<double>(area(compile(options.mask, shape.seq_q, shape.seq_kv))) *
                       static_cast<double>(shape.batch * shape.heads);
  const auto d = static_cast<double>(shape.dim_qk), dv = static_cast<double>(shape.dim_v);
  Json done{{"event", "done"},
            {"forward_gflops", pairs * 2 * (d + dv) / forward.p50 * 1e-6},
            {"milliseconds", {{"forward", forward.json()}}},
            {"ranks", world.size()},
            {"threads", num_threads()}};
  if (bench.backward) {
    const Percentiles backward = time_calls(world, bench.repeat, [&] { attention.backward(q, k, v, result, dout); });
    done["backward_gflops"] = pairs * 2 * (3 * d + 2 * dv) / backward.p50 * 1e-6;
    done["milliseconds"]["backward"] = backward.json();
  }
  if (on_cpu) {
    peak->add_to(done);
    const std::int64_t bytes = q->bytes() + k->bytes() + v->bytes() + result.out->bytes();
    const double read = on_all_ranks(world, [&] { return static_cast<double>(bytes); }) / forward.p50 * 1e-6;
    const double memory_read = on_all_ranks(world, [] { return read_bandwidth() * 1e-9; });
    done["bandwidth"] = {{"gbyte_per_s", read}, {"memory_gbyte_per_s", memory_read}, {"of_memory", read / memory_read}};
  }
  done["peak_memory_bytes"] = memory.peak();  // of this rank, inputs and what the kernel packs included
  if (world.rank() != 0) return;
  print_line(bench.common.json ? done.dump() : done.dump(2));
}

struct ProductBench {
  CommonOptions common;
  std::string dtype = "fp32";
  std::int64_t size = 4096;
  int repeat = 10;
};

// c = a b of square matrices, on every rank at once: what attention's rate is compared with.
void bench_product(const ProductBench& bench, const RunConfig& config, Communicator& world) {
  const Shape shape{bench.size, bench.size};
  const Tensor a = random_tensor(config.dtype, shape, 1), b = random_tensor(config.dtype, shape, 2);
  const Tensor c = Tensor::uninitialized(config.dtype, shape);
  const Percentiles time = time_calls(world, bench.repeat, [&] { matmul(a, b, c); });
  if (world.rank() != 0) return;
  const Json done{{"event", "done"},
                  {"gflops", 2 * std::pow(static_cast<double>(bench.size), 3) / time.p50 * 1e-6},
                  {"milliseconds", time.json()},
                  {"ranks", world.size()},
                  {"threads", num_threads()}};
  print_line(bench.common.json ? done.dump() : done.dump(2));
}

// Round trips and one-way streams between rank 0 and every neighbour distance of the job.
void bench_comm(bool json, int repeat, Communicator& world) {
  require(world.size() > 1, "bench comm measures between ranks but the job has 1; use --ranks 2 or mpirun -np 2");
  Json sizes = Json::array();
  for (const std::size_t bytes : {std::size_t{8}, std::size_t{1} << 16, std::size_t{1} << 20, std::size_t{1} << 24}) {
    std::vector<std::byte> out(bytes), in(bytes);
    const int next = (world.rank() + 1) % world.size(), before = (world.rank() + world.size() - 1) % world.size();
    const Percentiles time = time_calls(world, repeat, [&] {
      const SendPart send{next, out.data(), bytes};
      const RecvPart receive{before, in.data(), bytes};
      world.exchange({&send, 1}, {&receive, 1}, {"bench"});
    });
    sizes.push_back(
        {{"bytes", bytes}, {"milliseconds", time.json()}, {"gbyte_per_s", static_cast<double>(bytes) / time.p50 * 1e-6}});
  }
  if (world.rank() != 0) return;
  const Json done{{"event", "done"}, {"ranks", world.size()}, {"ring_exchange", sizes}};
  print_line(json ? done.dump() : done.dump(2));
}

}  // namespace

Command add_bench(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "how fast attention and communication are here")->require_subcommand(1);
  CLI::App* attention = command->add_subcommand("attention", "one attention call, on random tensors");
  const auto bench = std::make_shared<AttentionBench>();
  attention->add_option("--seq", bench->shape.seq, "positions")->capture_default_str();
  attention->add_option("--batch", bench->shape.batch, "batch rows")->capture_default_str();
  attention->add_option("--heads", bench->shape.heads, "query heads")->capture_default_str();
  attention->add_option("--kv-heads", bench->shape.kv_heads, "KV heads (default: heads)");
  attention->add_option("--dim", bench->shape.dim, "head dim")->capture_default_str();
  attention->add_option("--dtype", bench->dtype, "fp32, bf16 or fp16")->capture_default_str();
  attention->add_option("--mask", bench->mask, "full, causal, or more by --set attention.mask...")->capture_default_str();
  attention->add_option("--mesh", bench->mesh, "axis=size, for example ring=2")->delimiter(',');
  attention->add_flag("--backward", bench->backward, "time the backward pass too");
  attention->add_option("--repeat", bench->repeat, "timed calls")->capture_default_str()->check(CLI::PositiveNumber);
  bench->common.declare(*attention, true);

  CLI::App* product = command->add_subcommand("product", "one product of square matrices");
  const auto product_bench = std::make_shared<ProductBench>();
  product->add_option("--size", product_bench->size, "rows and columns")->capture_default_str()->check(CLI::PositiveNumber);
  product->add_option("--dtype", product_bench->dtype, "fp32, bf16 or fp16")->capture_default_str();
  product->add_option("--repeat", product_bench->repeat, "timed calls")->capture_default_str()->check(CLI::PositiveNumber);
  product_bench->common.declare(*product, true);

  CLI::App* comm = command->add_subcommand("comm", "messages between neighbouring ranks");
  const auto comm_options = std::make_shared<CommonOptions>();
  const auto comm_repeat = std::make_shared<int>(20);
  comm->add_option("--repeat", *comm_repeat, "timed exchanges")->capture_default_str()->check(CLI::PositiveNumber);
  comm_options->declare(*comm, false);

  return [attention, bench, product, product_bench, comm_options, comm_repeat] {
    if (attention->parsed()) {
      const auto load = [&] {
        const RunConfig config = config_of(*bench);
        return resolve_mesh(config, shape_of(bench->shape, config.dtype));
      };
      return run_with_config(bench->common, load,
                             [&](const RunConfig& config, Communicator& world) { bench_attention(*bench, config, world); });
    }
    if (product->parsed()) {
      const auto load = [&] {
        std::vector<std::string> set{"dtype=" + product_bench->dtype};
        set.insert(set.end(), product_bench->common.set.begin(), product_bench->common.set.end());
        return parse_config_as<RunConfig>("{}", "dattn bench", set);
      };
      return run_with_config(product_bench->common, load, [&](const RunConfig& config, Communicator& world) {
        bench_product(*product_bench, config, world);
      });
    }
    const auto load = [] { return RunConfig{}; };
    return run_with_config(*comm_options, load,
                           [&](const RunConfig&, Communicator& world) { bench_comm(comm_options->json, *comm_repeat, world); });
  };
}

}  // namespace dattn
