// dattn doctor: what was found on this machine, why a back end is off, and a short self-test on the present ranks.
#include <cmath>
#include <memory>

#include <fmt/format.h>

#include "core/attention/cudnn/library.h"
#include "core/base/error.h"
#include "core/base/threads.h"
#include "core/device/cuda_module.h"
#include "launch/commands/calibrate.h"
#include "launch/commands/commands.h"
#include "launch/commands/gather.h"
#include "launch/topology.h"
#include "parallel/comm/mpi.h"
#include "parallel/comm/nccl_api.h"
#include "parallel/strategy.h"
#include "parallel/verify.h"

namespace dattn {
namespace {

std::string cpu_features() {
#if defined(__x86_64__)
  std::string found;
  const auto note = [&](bool has, const char* name) {
    if (has) found += fmt::format("{}{}", found.empty() ? "" : " ", name);
  };
  note(__builtin_cpu_supports("avx2"), "avx2");
  note(__builtin_cpu_supports("fma"), "fma");
  note(__builtin_cpu_supports("avx512f"), "avx512f");
  note(__builtin_cpu_supports("avx512bf16"), "avx512bf16");
  return found.empty() ? "none of avx2, fma, avx512f, avx512bf16" : found;
#else
  return "the compiler's defaults";
#endif
}

Json finding(bool found, const std::string& detail) { return {{"found", found}, {"detail", detail}}; }

// The CUDA module, what it runs on, and the libraries it would load.
Json cuda_report() {
  std::string why;
  const CudaModule* module = find_cuda_module(why);
  if (module == nullptr) return finding(false, why);
  const std::vector<CudaDevice>& devices = cuda_devices(why);
  const CudaVersions cuda = module->versions();
  Json report =
      finding(!devices.empty(), devices.empty() ? why
                                                : fmt::format("{} device(s), driver {}, runtime {}, module: {}", devices.size(),
                                                              cuda.driver, cuda.runtime, module->flavour));
  Json names = Json::array();
  for (const CudaDevice& device : devices) {
    names.push_back(fmt::format("{} (compute capability {}.{}, {} multiprocessors, {:.1f} GiB){}", device.name, device.major,
                                device.minor, device.multiprocessors, static_cast<double>(device.memory_bytes) / 0x1p30,
                                device.unusable.empty() ? "" : ", not usable: " + device.unusable));
  }
  report["devices"] = names;
  report["matrix_products"] = module->matmul_library();
  report["determinism"] = "off unless the config asks for repeatable or invariant";
  return report;
}

// Where the GPUs and network interfaces are plugged in.
Json topology_report() {
  std::string why;
  std::vector<std::string> buses;
  for (const CudaDevice& device : cuda_devices(why)) buses.push_back(device.pci);
  const Topology topology = read_topology(buses);
  Json places = Json::array();
  for (const GpuPlace& gpu : topology.gpus) places.push_back(text_of(gpu));
  for (const PciPlace& interface : topology.interfaces) places.push_back(text_of(interface));
  return places;
}

Json cudnn_report() {
  const cudnn::CudnnLibrary& found = cudnn::library();
  if (found.handle == nullptr) return finding(false, found.why);
  return finding(true, fmt::format("{} at {}", cudnn::version_text(found.version), found.path));
}

Json report() {
  const ShimReport mpi = probe_mpi();
  const Launch launch = detect_launch();
  const NcclReport nccl = probe_nccl();
  Json kernels = Json::array();
  for (const AttentionKernel* kernel : attention_kernels(current_device())) kernels.push_back(kernel->name());
  Json names = Json::array();
  for (const Strategy& strategy : strategies()) names.push_back(strategy.name);
  return {{"version", DATTN_VERSION},
          {"cores", available_cores()},
          {"cpu_features", cpu_features()},
          {"launcher", launch.launcher.empty() ? "none" : launch.launcher},
          {"mpi", {{"found", mpi.found}, {"detail", mpi.detail}}},
          {"device", to_text(current_device())},
          {"cuda", cuda_report()},
          {"cudnn", cudnn_report()},
          {"nccl", finding(nccl.found, nccl.detail)},
          {"topology", topology_report()},
          {"kernels", kernels},
          {"strategies", names}};
}

constexpr AttentionShape kSelfTest{
    .batch = 1, .seq_q = 257, .seq_kv = 257, .heads = 4, .kv_heads = 2, .dim_qk = 32, .dim_v = 32, .dtype = DType::kF32};

// The largest difference between a sharded causal attention over all present ranks and the reference kernel.
double self_test(Communicator& world, const std::string& strategy, const MeshShape& shape) {
  AttentionOptions options;
  options.strategy = strategy;
  const Mesh mesh(world, shape);
  ShardedAttention attention(mesh, kSelfTest, options);
  const Tensor q = random_tensor(DType::kF32, {1, 257, 4, 32}, 1), k = random_tensor(DType::kF32, {1, 257, 2, 32}, 2),
               v = random_tensor(DType::kF32, {1, 257, 2, 32}, 3);
  const Shard rows{{0, 1}, attention.q_positions(), attention.heads().q},
      keys{{0, 1}, attention.kv_positions(), attention.heads().kv};
  const AttentionResult result =
      attention.forward(take_shard(q, rows, DType::kF32), take_shard(k, keys, DType::kF32), take_shard(v, keys, DType::kF32));
  const Tensor got = to_device(result.out, Device{});

  const DeviceScope host(Device{});
  Tensor out(DType::kF32, q->shape), lse(DType::kF32, {1, 4, 257});
  const std::vector<Tile> tiles =
      make_tiles(compile(options.mask, 257, 257), Positions::range(0, 257), Positions::range(0, 257));
  reference_kernel().attend({q, k, v, {0, 0, 2}, tiles, 1.0 / std::sqrt(32.0), out, lse, false});
  const Tensor expected = take_shard(out, rows, DType::kF32);
  double largest = 0;
  for (std::int64_t i = 0; i < expected->elements(); ++i) {
    largest = std::max(largest, static_cast<double>(std::abs(got.ptr<float>()[i] - expected.ptr<float>()[i])));
  }
  Tensor everywhere(DType::kF32, {1});
  everywhere.ptr<float>()[0] = static_cast<float>(largest);
  world.all_reduce_max(everywhere, {"doctor"});
  return everywhere.ptr<float>()[0];
}

Json self_tests(Communicator& world) {
  Json results;
  for (const Axis axis : kSequenceAxes) {
    MeshShape mesh;
    mesh.set(axis, world.size());
    for (const Strategy& strategy : strategies()) {
      if (!strategy.accepts(*make_problem(mesh, kSelfTest, {})).ok) continue;
      const double error = self_test(world, std::string(strategy.name), mesh);
      ensure(error < 1e-5, "self-test of strategy {} on {} ranks differs from the reference by {}", strategy.name, world.size(),
             error);
      results[fmt::format("{} on {} {}", strategy.name, name_of(axis), world.size())] = error;
    }
  }
  return results;
}

// One line for each finding, one below it for each part that a finding has beside; lists of text have a line for each entry.
void print_value(const std::string& key, const Json& value, const std::string& indent) {
  if (value.is_object() && value.contains("detail")) {
    print_value(key, fmt::format("{}: {}", value["found"].get<bool>() ? "found" : "off", value["detail"].get<std::string>()),
                indent);
    for (const auto& [part, content] : value.items()) {
      if (part != "detail" && part != "found") print_value(part, content, indent + "  ");
    }
  } else if (value.is_array() && !indent.empty()) {
    for (const Json& entry : value) print_value(key, entry, indent);
  } else {
    print_line(fmt::format("{:<14} {}", indent + key, value.is_string() ? value.get<std::string>() : value.dump()));
  }
}

void print_report(const Json& done) {
  for (const auto& [key, value] : done.items()) {
    if (key != "event") print_value(key, value, "");
  }
}

}  // namespace

Command add_doctor(CLI::App& app) {
  CLI::App* command = app.add_subcommand("doctor", "what was found on this machine, and a self-test on the present ranks");
  const auto common = std::make_shared<CommonOptions>();
  common->declare(*command, true);
  const auto machine = std::make_shared<std::string>();
  command->add_option("--calibrate", *machine, "measure this machine and write it to FILE, for dattn plan --simulate")
      ->type_name("FILE");
  return [common, machine] {
    const auto load = [&] { return parse_config_as<RunConfig>("{}", "dattn doctor", common->set); };
    return run_with_config(*common, load, [&](const RunConfig&, Communicator& world) {
      Json done{{"event", "done"}};
      if (world.rank() == 0) done.update(report());
      done["ranks"] = world.size();
      done["threads"] = num_threads();
      done["self_test"] = self_tests(world);
      if (!machine->empty()) done["calibration"] = calibrate(world, *machine);
      if (world.rank() != 0) return;
      common->json ? print_json(done) : print_report(done);
    });
  };
}

}  // namespace dattn
