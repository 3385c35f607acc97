#include "launch/commands/calibrate.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/host.h"
#include "core/base/threads.h"
#include "launch/commands/timing.h"

namespace dattn {
namespace {

constexpr int kRepeat = 7;

double rounded(double value) { return std::stod(fmt::format("{:.4g}", value)); }

template <class Body>
double seconds_of(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Median seconds of one call that all ranks make at once.
double measure(Communicator& world, const std::function<void()>& body) {
  return percentiles_of(time_calls(world, kRepeat, body)).p50 * 1e-3;
}

// The calls of both kernels for one batch row and `heads` heads of dim 64; all pairs visible, or those of a causal mask.
class KernelCalls {
 public:
  KernelCalls(DType storage, std::int64_t rows, std::int64_t heads)
      : q_(random_tensor(storage, {1, rows, heads, 64}, 1)),
        k_(random_tensor(storage, q_->shape, 2)),
        v_(random_tensor(storage, q_->shape, 3)),
        dout_(random_tensor(storage, q_->shape, 4)),
        lse_(accumulate_type(storage), {1, heads, rows}),
        delta_(lse_->dtype, lse_->shape),
        out_(lse_->dtype, q_->shape),
        dq_(lse_->dtype, q_->shape),
        dk_(lse_->dtype, q_->shape),
        dv_(lse_->dtype, q_->shape),
        full_{{{{0, rows}, {0, rows}, -kUnbounded, kUnbounded}}},
        causal_{{{{0, rows}, {0, rows}, -kUnbounded, 0}}},
        kernel_(select_kernel({storage, 64, 64})) {}

  void forward(bool causal = false) const {
    kernel_.attend({q_, k_, v_, {}, causal ? causal_ : full_, 0.125, out_, lse_, false});
  }
  void backward(bool causal = false) const {
    kernel_.attend_grad({q_, k_, v_, {}, causal ? causal_ : full_, 0.125, dout_, lse_, delta_, dq_, dk_, dv_});
  }

 private:
  Tensor q_, k_, v_, dout_, lse_, delta_, out_, dq_, dk_, dv_;
  std::vector<Tile> full_, causal_;
  const AttentionKernel& kernel_;
};

// The square tile of a kernel that takes `share` of a full mask's time for a causal one: S^2 / 2 pairs are visible there, and
// tiles of t x t along the diagonal add S t / 2. The share is of few rows, where the diagonal weighs most, and the median of
// many pairs of calls, one after the other. Measured by rank 0 while the others wait: ranks that share its core would not
// change the share, but make it noise.
TileSize measure_tile(Communicator& world, const std::function<void(bool causal)>& call, std::int64_t rows) {
  constexpr int kPairs = 41;
  double rows_of_tile = 0;
  if (world.rank() == 0) {
    std::vector<double> shares;
    for (int i = 0; i < kPairs; ++i) {
      const double full = seconds_of([&] { call(false); });
      shares.push_back(seconds_of([&] { call(true); }) / full);
    }
    rows_of_tile =
        std::clamp((2 * percentiles_of(std::move(shares)).p50 - 1) * static_cast<double>(rows), 1.0, static_cast<double>(rows));
  }
  world.all_reduce_max(TensorView(&rows_of_tile, DType::kF64, {1}), {"calibrate"});
  const std::int64_t size = std::llround(rows_of_tile);
  return {size, size, true};
}

// Rates of both kernels. The larger one stands for the peak; the shares are means over the storage types.
void measure_kernels(Communicator& world, Machine& machine) {
  constexpr std::int64_t kRows = 1024, kHeads = 4, kTileRows = 256;
  machine.attend_of_peak = machine.attend_grad_of_peak = 0;
  for (const auto& [storage, peak] : {std::pair{DType::kF32, &machine.flops.fp32}, {DType::kBF16, &machine.flops.bf16}}) {
    const KernelCalls calls(storage, kRows, kHeads);
    const double pairs = static_cast<double>(kRows * kRows * kHeads);
    const double forward = pairs * 2 * 128 / measure(world, [&] { calls.forward(); });
    const double backward = pairs * 2 * 320 / measure(world, [&] { calls.backward(); });
    *peak = rounded(std::max(forward, backward));
    machine.attend_of_peak += forward / *peak / 2;
    machine.attend_grad_of_peak += backward / *peak / 2;
  }
  machine.attend_of_peak = std::min(1.0, rounded(machine.attend_of_peak));
  machine.attend_grad_of_peak = std::min(1.0, rounded(machine.attend_grad_of_peak));
  const KernelCalls few(DType::kF32, kTileRows, kHeads), one(DType::kF32, 1, 1);
  machine.tile = measure_tile(
      world, [&](bool causal) { few.forward(causal); }, kTileRows);
  machine.grad_tile = measure_tile(
      world, [&](bool causal) { few.backward(causal); }, kTileRows);
  machine.kernel_latency_s = rounded(measure(world, [&] { one.forward(); }));
}

double measure_memory(Communicator& world) {
  const Tensor from(DType::kF32, {std::int64_t{1} << 24});
  Tensor to(DType::kF32, {std::int64_t{1} << 24});
  return 2.0 * static_cast<double>(from->bytes()) / measure(world, [&] { copy(from, to); });
}

// Rank 0 and `other` exchange messages; the ranks between them wait.
Link measure_pair(Communicator& world, int other) {
  const int peer = world.rank() == 0 ? other : world.rank() == other ? 0 : -1;
  return measure_link(world, world, peer, peer, kRepeat).link;
}

// Links and nodes: consecutive ranks of equal host names are one node.
void measure_links(Communicator& world, Machine& machine) {
  const std::vector<std::string> hosts = world.gather_strings(host_name(), {"calibrate"});
  const auto elsewhere = std::find_if(hosts.begin(), hosts.end(), [&](const std::string& host) { return host != hosts[0]; });
  machine.ranks_per_node = static_cast<int>(elsewhere - hosts.begin());
  if (elsewhere != hosts.end()) machine.links.between = measure_pair(world, machine.ranks_per_node);
  machine.links.inside = machine.ranks_per_node > 1 ? measure_pair(world, 1) : *machine.links.between;
}

}  // namespace

MeasuredLink measure_link(Communicator& world, Communicator& group, int to, int from, int repeat) {
  std::vector<LinkSample> samples;
  Json sizes = Json::array();
  for (std::size_t bytes = 8; bytes <= std::size_t{1} << 24; bytes *= 8) {
    std::vector<std::byte> out(bytes), in(bytes);
    const SendPart send{to, out.data(), bytes};
    const RecvPart receive{from, in.data(), bytes};
    const std::size_t parts = to >= 0 ? 1 : 0;
    const Percentiles time = percentiles_of(time_calls(world, repeat, [&] {
      group.exchange({&send, parts}, {&receive, parts}, {"bench"});
    }));
    samples.push_back({static_cast<double>(bytes), time.p50 * 1e-3});
    sizes.push_back(
        {{"bytes", bytes}, {"milliseconds", time.json()}, {"gbyte_per_s", static_cast<double>(bytes) / time.p50 * 1e-6}});
  }
  const Link link = fit_link(samples);
  return {{rounded(link.latency_s), rounded(link.bandwidth), std::nullopt}, std::move(sizes)};
}

void write_machine(const std::string& path, const Machine& machine, const std::string& made) {
  write_file(path, fmt::format("# {}.\n#   dattn plan CONFIG --simulate THIS_FILE\n{}\n", made, to_yaml(to_node(machine))));
}

Json calibrate(Communicator& world, const std::string& path) {
  require(world.size() > 1, "doctor --calibrate measures links between ranks but the job has 1; use --ranks 2 or mpirun -np 2");
  Machine machine;
  machine.name = host_name();
  measure_kernels(world, machine);
  machine.memory_bandwidth = rounded(measure_memory(world));
  measure_links(world, machine);
  machine.memory_bytes =
      static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE) / machine.ranks_per_node;
  if (world.rank() == 0) {
    write_machine(
        path, machine,
        fmt::format("Measured by dattn doctor --calibrate with {} ranks, threads of each: {}", world.size(), num_threads()));
  }
  return {{"file", path}, {"machine", Json::parse(to_json(to_node(machine)))}};
}

}  // namespace dattn
