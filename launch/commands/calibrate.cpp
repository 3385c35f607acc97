#include "launch/commands/calibrate.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/host.h"
#include "core/base/threads.h"
#include "parallel/machine.h"

namespace dattn {
namespace {

constexpr int kRepeat = 7;

double rounded(double value) { return std::stod(fmt::format("{:.4g}", value)); }

// Median seconds of one call, on the slowest of the ranks; all of them call at once.
template <class Body>
double measure(Communicator& world, const Body& body) {
  std::vector<double> times;
  body();  // warms up: memory pages, threads
  for (int i = 0; i < kRepeat; ++i) {
    world.barrier({"calibrate"});
    const auto start = std::chrono::steady_clock::now();
    body();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  Tensor slowest(DType::kF32, {1});
  slowest.ptr<float>()[0] = static_cast<float>(times[kRepeat / 2]);
  world.all_reduce_max(slowest, {"calibrate"});
  return slowest.ptr<float>()[0];
}

struct KernelTimes {
  double forward_s = 0, backward_s = 0;
};

// One batch row, `heads` heads of dim 64; all pairs visible, or those of a causal mask.
KernelTimes time_kernel(Communicator& world, DType storage, std::int64_t rows, std::int64_t heads, bool causal = false) {
  const Shape shape{1, rows, heads, 64}, statistics{1, heads, rows};
  const DType sum = accumulate_type(storage);
  const Tensor q = random_tensor(storage, shape, 1), k = random_tensor(storage, shape, 2), v = random_tensor(storage, shape, 3),
               dout = random_tensor(storage, shape, 4);
  Tensor out(sum, shape), lse(sum, statistics), delta(sum, statistics), dq(sum, shape), dk(sum, shape), dv(sum, shape);
  const std::vector<Tile> tiles{{{{0, rows}, {0, rows}, -kUnbounded, causal ? 0 : kUnbounded}}};
  const AttentionKernel& kernel = select_kernel({storage, 64, 64});
  const auto forward = [&] { kernel.attend({q, k, v, {}, tiles, 0.125, out, lse, false}); };
  const auto backward = [&] { kernel.attend_grad({q, k, v, {}, tiles, 0.125, dout, lse, delta, dq, dk, dv}); };
  const double forward_s = measure(world, forward);
  return {forward_s, measure(world, backward)};
}

// The square tile of a kernel that takes `share` of a full mask's time for a causal one: S^2 / 2 pairs are visible there, and
// tiles of t x t along the diagonal add S t / 2.
TileSize tile_of(double share, std::int64_t rows) {
  const auto size = std::clamp<std::int64_t>(std::llround((2 * share - 1) * static_cast<double>(rows)), 1, rows);
  return {size, size};
}

// Rates of both kernels. The larger one stands for the peak; the shares are means over the storage types.
void measure_kernels(Communicator& world, Machine& machine) {
  constexpr std::int64_t kRows = 1024, kHeads = 4;
  machine.attend_of_peak = machine.attend_grad_of_peak = 0;
  const KernelTimes fp32 = time_kernel(world, DType::kF32, kRows, kHeads),
                    bf16 = time_kernel(world, DType::kBF16, kRows, kHeads);
  for (const auto& [times, peak] : {std::pair{fp32, &machine.flops.fp32}, std::pair{bf16, &machine.flops.bf16}}) {
    const double pairs = static_cast<double>(kRows * kRows * kHeads);
    const double forward = pairs * 2 * 128 / times.forward_s, backward = pairs * 2 * 320 / times.backward_s;
    *peak = rounded(std::max(forward, backward));
    machine.attend_of_peak += forward / *peak / 2;
    machine.attend_grad_of_peak += backward / *peak / 2;
  }
  machine.attend_of_peak = std::min(1.0, rounded(machine.attend_of_peak));
  machine.attend_grad_of_peak = std::min(1.0, rounded(machine.attend_grad_of_peak));
  const KernelTimes causal = time_kernel(world, DType::kF32, kRows, kHeads, true);
  machine.tile = tile_of(causal.forward_s / fp32.forward_s, kRows);
  machine.grad_tile = tile_of(causal.backward_s / fp32.backward_s, kRows);
  machine.kernel_latency_s = rounded(time_kernel(world, DType::kF32, 1, 1).forward_s);
}

double measure_memory(Communicator& world) {
  const Tensor from(DType::kF32, {std::int64_t{1} << 24});
  Tensor to(DType::kF32, {std::int64_t{1} << 24});
  return 2.0 * static_cast<double>(from->bytes()) / measure(world, [&] { copy(from, to); });
}

// Rank 0 and `other` exchange messages of several sizes; the ranks between them wait.
Link measure_link(Communicator& world, int other) {
  std::vector<LinkSample> samples;
  for (std::size_t bytes = 1024; bytes <= (std::size_t{1} << 24); bytes *= 4) {
    std::vector<std::byte> out(bytes), in(bytes);
    const int peer = world.rank() == 0 ? other : 0;
    const bool takes_part = world.rank() == 0 || world.rank() == other;
    const double seconds = measure(world, [&] {
      if (!takes_part) return;
      const SendPart send{peer, out.data(), bytes};
      const RecvPart receive{peer, in.data(), bytes};
      world.exchange({&send, 1}, {&receive, 1}, {"calibrate"});
    });
    samples.push_back({static_cast<double>(bytes), seconds});
  }
  const Link link = fit_link(samples);
  return {rounded(link.latency_s), rounded(link.bandwidth), std::nullopt};
}

// Links and nodes: consecutive ranks of equal host names are one node.
void measure_links(Communicator& world, Machine& machine) {
  const std::vector<std::string> hosts = world.gather_strings(host_name(), {"calibrate"});
  const auto elsewhere = std::find_if(hosts.begin(), hosts.end(), [&](const std::string& host) { return host != hosts[0]; });
  machine.ranks_per_node = static_cast<int>(elsewhere - hosts.begin());
  if (elsewhere != hosts.end()) machine.links.between = measure_link(world, machine.ranks_per_node);
  machine.links.inside = machine.ranks_per_node > 1 ? measure_link(world, 1) : *machine.links.between;
}

}  // namespace

Json calibrate(Communicator& world, const std::string& path) {
  require(world.size() > 1, "doctor --calibrate measures links between ranks but the job has 1; use --ranks 2 or mpirun -np 2");
  Machine machine;
  machine.name = host_name();
  measure_kernels(world, machine);
  machine.memory_bandwidth = rounded(measure_memory(world));
  measure_links(world, machine);
  machine.memory_bytes =
      static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE) / machine.ranks_per_node;
  const ConfigNode node = to_node(machine);
  if (world.rank() == 0) {
    write_file(path,
               fmt::format("# Measured by dattn doctor --calibrate with {} ranks, threads of each: {}.\n#   dattn plan CONFIG "
                           "--simulate THIS_FILE\n{}\n",
                           world.size(), num_threads(), to_yaml(node)));
  }
  return {{"file", path}, {"machine", Json::parse(to_json(node))}};
}

}  // namespace dattn
