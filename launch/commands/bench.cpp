// dattn bench attention | train | product | comm: how fast attention, training and matrix products run on the present ranks,
// and what the axes of a mesh carry.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "core/attention/cpu/peak.h"
#include "core/base/error.h"
#include "core/base/host.h"
#include "core/base/threads.h"
#include "core/nn/matmul.h"
#include "launch/commands/bench_train.h"
#include "launch/commands/calibrate.h"
#include "launch/commands/planning.h"
#include "launch/commands/timing.h"
#include "parallel/attention.h"
#include "parallel/cost_model.h"

namespace dattn {
namespace {

struct AttentionBench {
  CommonOptions common;
  ShapeConfig shape;
  std::string dtype = "fp32", mask = "causal";
  std::vector<std::string> mesh;  // axis=size
  bool backward = false;
  int repeat = 5;
};

// The command's own options as a config, so that --mesh and --mask are checked as a file's keys are.
RunConfig config_of(const CommonOptions& common, const std::vector<std::string>& mesh, std::vector<std::string> set = {}) {
  for (const std::string& axis : mesh) set.push_back("mesh." + axis);
  set.insert(set.end(), common.set.begin(), common.set.end());
  return parse_config_as<RunConfig>("{}", "dattn bench", set);
}

void bench_attention(const AttentionBench& bench, const RunConfig& config, Communicator& world) {
  const AttentionShape whole = shape_of(bench.shape, config.dtype);
  const Mesh mesh(world, config.mesh.shape());
  const auto [batch, shape, options] = data_share(config, whole, mesh.coordinate(Axis::kData));
  ShardedAttention attention(mesh, shape, options);
  const std::int64_t rows = attention.q_positions().count(), keys = attention.kv_positions().count();
  const HeadRange heads = attention.heads();
  const TensorMeter memory;
  const Tensor q = random_tensor(shape.dtype, {shape.batch, rows, heads.q.count(), shape.dim_qk}, 1);
  const Tensor k = random_tensor(shape.dtype, {shape.batch, keys, heads.kv.count(), shape.dim_qk}, 2);
  const Tensor v = random_tensor(shape.dtype, {shape.batch, keys, heads.kv.count(), shape.dim_v}, 3);
  const Tensor dout = random_tensor(shape.dtype, {shape.batch, rows, heads.q.count(), shape.dim_v}, 4);

  const AttentionCall place{.batch_begin = batch.begin};
  AttentionResult result;
  const Mask mask = attention_options(config, whole.seq_q, whole.seq_kv).mask;
  const double pairs =
      visible_pairs(compile_batch(mask, whole.batch, whole.seq_q, whole.seq_kv)) * static_cast<double>(whole.heads);
  const auto d = static_cast<double>(shape.dim_qk), dv = static_cast<double>(shape.dim_v);
  Json done{{"event", "done"}, {"ranks", world.size()}, {"threads", num_threads()}};
  PeakTimer timer(world, shape.dtype);
  const Percentiles forward =
      timer.time(done, "forward_", pairs * 2 * (d + dv), bench.repeat, [&] { result = attention.forward(q, k, v, place); });
  done["milliseconds"]["forward"] = forward.json();
  if (bench.backward) {
    const auto call = [&] { attention.backward(q, k, v, result, dout, place); };
    done["milliseconds"]["backward"] = timer.time(done, "backward_", pairs * 2 * (3 * d + 2 * dv), bench.repeat, call).json();
  }
  timer.add_peaks(done);
  done["peak_memory_bytes"] = memory.peak();  // of this rank: tensors, what forward packs among them; not threads' scratch
  if (!current_device().is_cuda()) {
    // Of few queries' keys, as many as are seen at most.
    const double keys_seen = std::min(1.0, pairs / static_cast<double>(whole.batch * whole.heads * whole.seq_kv));
    const double bytes =
        static_cast<double>(q->bytes() + result.out->bytes()) + keys_seen * static_cast<double>(k->bytes() + v->bytes());
    const double read = sum_of_ranks(world, [&] { return bytes; }) / forward.p50 * 1e-6;
    const double memory_read = sum_of_ranks(world, [] { return read_bandwidth() * 1e-9; });
    done["bandwidth"] = {{"gbyte_per_s", read}, {"memory_gbyte_per_s", memory_read}, {"of_memory", read / memory_read}};
  }
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
  const Percentiles time = percentiles_of(time_calls(world, bench.repeat, [&] { matmul(a, b, c); }));
  if (world.rank() != 0) return;
  const Json done{{"event", "done"},
                  {"gflops", 2 * std::pow(static_cast<double>(bench.size), 3) / time.p50 * 1e-6},
                  {"milliseconds", time.json()},
                  {"ranks", world.size()},
                  {"threads", num_threads()}};
  print_line(bench.common.json ? done.dump() : done.dump(2));
}

struct CommBench {
  CommonOptions common;
  std::vector<std::string> mesh;  // axis=size
  std::string machine;            // a file whose links are replaced
  int repeat = 20;
};

// Every rank of the axis sends to the next and hears from the one before, all at once. A machine file has one link for the axes
// within a host and one for those between hosts: that of the slowest such axis.
Json bench_axis(Communicator& world, Communicator& axis, int repeat, std::optional<Link>& inside,
                std::optional<Link>& between) {
  const std::vector<std::string> hosts = axis.gather_strings(host_name(), {"bench"});
  double crosses = std::count(hosts.begin(), hosts.end(), hosts[0]) < axis.size() ? 1 : 0;
  world.all_reduce_max(TensorView(&crosses, DType::kF64, {1}), {"bench"});
  const int next = (axis.rank() + 1) % axis.size(), before = (axis.rank() + axis.size() - 1) % axis.size();
  const auto [link, sizes] = measure_link(world, axis, next, before, repeat);
  std::optional<Link>& slowest = crosses > 0 ? between : inside;
  if (!slowest || link.bandwidth < slowest->bandwidth) slowest = link;
  return {{"size", axis.size()},
          {"between_hosts", crosses > 0},
          {"latency_s", link.latency_s},
          {"bandwidth", link.bandwidth},
          {"sizes", sizes}};
}

// Latency and bandwidth of the mesh's axes, or of the whole job as one ring: what the links of a machine file hold.
void bench_comm(const CommBench& bench, const RunConfig& config, Communicator& world) {
  require(world.size() > 1, "bench comm measures between ranks but the job has 1; use --ranks 2 or mpirun -np 2");
  std::optional<Machine> machine;
  if (!bench.machine.empty()) machine = load_machine(bench.machine);
  std::optional<Link> inside, between;
  Json axes = Json::object();
  if (bench.mesh.empty()) {
    axes["job"] = bench_axis(world, world, bench.repeat, inside, between);
  } else {
    const Mesh mesh(world, config.mesh.shape());
    for (const Axis axis : kAxes) {
      if (mesh.shape().size(axis) == 1) continue;
      axes[std::string(name_of(axis))] = bench_axis(world, mesh.axis(axis), bench.repeat, inside, between);
    }
  }
  if (world.rank() != 0) return;
  Json done{{"event", "done"}, {"ranks", world.size()}, {"axes", axes}};
  if (machine) {  // but for what all ranks of a node share
    Links& links = machine->links;
    if (inside) links.inside = {inside->latency_s, inside->bandwidth, links.inside.node_bandwidth};
    if (between) {
      const std::optional<double> of_node = links.between ? links.between->node_bandwidth : std::nullopt;
      links.between = {between->latency_s, between->bandwidth, of_node};
    }
    write_machine(bench.machine, *machine, fmt::format("Links measured by dattn bench comm with {} ranks", world.size()));
    done["machine"] = bench.machine;
  }
  print_line(bench.common.json ? done.dump() : done.dump(2));
}

}  // namespace

Command add_bench(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("bench", "how fast attention, training and communication are here")->require_subcommand(1);
  CLI::App* attention = command->add_subcommand("attention", "one attention call, on random tensors");
  const auto bench = std::make_shared<AttentionBench>();
  attention->add_option("--seq", bench->shape.seq, "positions")->capture_default_str();
  attention->add_option("--seq-kv", bench->shape.seq_kv,
                        "key positions (default: --seq); one query against many is a decode step");
  attention->add_option("--batch", bench->shape.batch, "batch rows, shared out over mesh.data")->capture_default_str();
  attention->add_option("--heads", bench->shape.heads, "query heads")->capture_default_str();
  attention->add_option("--kv-heads", bench->shape.kv_heads, "KV heads (default: heads)");
  attention->add_option("--dim", bench->shape.dim, "head dim")->capture_default_str();
  attention->add_option("--dtype", bench->dtype, "fp32, bf16 or fp16")->capture_default_str();
  attention->add_option("--mask", bench->mask, "full, causal, or more by --set attention.mask...")->capture_default_str();
  attention->add_option("--mesh", bench->mesh, "axis=size, for example ring=2")->delimiter(',');
  attention->add_flag("--backward", bench->backward, "time the backward pass too");
  attention->add_option("--repeat", bench->repeat, "timed calls")->capture_default_str()->check(CLI::PositiveNumber);
  bench->common.declare(*attention, true);
  bench->common.declare_trace(*attention);

  CLI::App* product = command->add_subcommand("product", "one product of square matrices");
  const auto product_bench = std::make_shared<ProductBench>();
  product->add_option("--size", product_bench->size, "rows and columns")->capture_default_str()->check(CLI::PositiveNumber);
  product->add_option("--dtype", product_bench->dtype, "fp32, bf16 or fp16")->capture_default_str();
  product->add_option("--repeat", product_bench->repeat, "timed calls")->capture_default_str()->check(CLI::PositiveNumber);
  product_bench->common.declare(*product, true);

  const Command train = add_bench_train(*command);

  CLI::App* comm = command->add_subcommand("comm", "messages along each axis of a mesh");
  const auto comm_bench = std::make_shared<CommBench>();
  comm->add_option("--mesh", comm_bench->mesh, "axis=size, for example ring=2 (default: the job as one ring)")->delimiter(',');
  comm->add_option("--machine", comm_bench->machine, "put the links into this machine file")->type_name("FILE");
  comm->add_option("--repeat", comm_bench->repeat, "timed exchanges")->capture_default_str()->check(CLI::PositiveNumber);
  comm_bench->common.declare(*comm, true);

  return [command, attention, bench, product, product_bench, train, comm_bench] {
    if (command->got_subcommand("train")) return train();
    if (attention->parsed()) {
      const auto load = [&] {
        const RunConfig config =
            config_of(bench->common, bench->mesh, {"attention.mask.kind=" + bench->mask, "dtype=" + bench->dtype});
        return resolve_mesh(config, data_share(config, shape_of(bench->shape, config.dtype)).shape);
      };
      return run_with_config(bench->common, load,
                             [&](const RunConfig& config, Communicator& world) { bench_attention(*bench, config, world); });
    }
    if (product->parsed()) {
      const auto load = [&] { return config_of(product_bench->common, {}, {"dtype=" + product_bench->dtype}); };
      return run_with_config(product_bench->common, load, [&](const RunConfig& config, Communicator& world) {
        bench_product(*product_bench, config, world);
      });
    }
    const auto load = [&] { return config_of(comm_bench->common, comm_bench->mesh); };
    return run_with_config(comm_bench->common, load,
                           [&](const RunConfig& config, Communicator& world) { bench_comm(*comm_bench, config, world); });
  };
}

}  // namespace dattn
