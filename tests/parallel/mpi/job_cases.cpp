// One rank of a job of processes, for the tests that need real ones: every collective case, failures of all kinds, and
// the speed of an exchange. Started by mpirun:
//
//   mpirun -np 4 ... dattn_job_cases collectives
//   mpirun -np 4 ... dattn_job_cases deadlock --timeout 3
//   mpirun -np 4 ... dattn_job_cases nccl_collectives     any case with device tensors over NCCL
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>

#include "core/base/error.h"
#include "core/device/cuda_module.h"
#include "launch/bootstrap.h"
#include "parallel/comm/nccl.h"
#include "tests/parallel/comm/cases.h"

namespace dattn::test {
namespace {

using Clock = std::chrono::steady_clock;

void pause_s(double time) { std::this_thread::sleep_for(std::chrono::duration<double>(time)); }
double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void all_reduce_for_ever(Communicator& world) {
  Tensor data(DType::kF32, Shape{100000});
  for (int step = 0;; ++step) {
    world.all_reduce_sum(data, {.verb = "all_reduce", .layer = 1, .step = step});
    pause_s(0.02);
  }
}

// One rank, on its fifth step, does something to itself.
void fail_in_the_middle(Communicator& world, void (*how)()) {
  Tensor data(DType::kF32, Shape{100000});
  for (int step = 0; step < 5; ++step) world.all_reduce_sum(data, {.verb = "all_reduce", .step = step});
  if (world.rank() == world.size() - 1) how();
  all_reduce_for_ever(world);
}

void collectives(Communicator& world) {
  for (const Case& one : collective_cases()) {
    one.run(world);
    if (world.rank() == 0) std::printf("ok %s\n", one.name.c_str());
  }
}

void killed(Communicator& world) {
  fail_in_the_middle(world, [] { kill(getpid(), SIGKILL); });
}
void stopped(Communicator& world) {
  fail_in_the_middle(world, [] { kill(getpid(), SIGSTOP); });
}
void vanished(Communicator& world) {
  fail_in_the_middle(world, [] { fail(ErrorCode::kSystem, "checkpoint.tmp: no space left on device"); });
}
void bad_input_everywhere(Communicator&) { fail(ErrorCode::kBadInput, "configs/x.yaml:3:1: unknown key 'stratgy'"); }

void deadlock(Communicator& world) {
  int value = 0;
  const RecvPart receive{(world.rank() + 1) % world.size(), &value, sizeof value};
  world.exchange({}, {&receive, 1}, {.verb = "rotate", .layer = 4, .step = 2});
}

void sizes_differ(Communicator& world) {
  std::vector<char> data(100000);
  const SendPart send{1, data.data(), 96};
  const RecvPart receive{0, data.data(), 64};
  if (world.rank() == 0) world.exchange({&send, 1}, {}, {.verb = "gather"});
  if (world.rank() == 1) world.exchange({}, {&receive, 1}, {.verb = "rotate", .layer = 2});
}

// A chain of ranks behind one that computes for longer than the deadline, burning its core as real work does.
void long_compute(Communicator& world) {
  const int last = world.size() - 1;
  if (world.rank() == last) {
    for (const auto begin = Clock::now(); seconds_since(begin) < 5;) {
    }
  }
  std::vector<double> token(500000, world.rank() == last ? 1.0 : 0.0);
  const RecvPart receive{world.rank() + 1, token.data(), token.size() * sizeof(double)};
  if (world.rank() < last) world.exchange({}, {&receive, 1}, {.verb = "rotate"});
  const SendPart send{world.rank() - 1, token.data(), token.size() * sizeof(double)};
  if (world.rank() > 0) world.exchange({&send, 1}, {}, {.verb = "rotate"});
  ensure(token.back() == 1.0, "the token is {}", token.back());
  if (world.rank() == 0) std::printf("ok long_compute\n");
}

// Ring exchange, all ranks at once: seconds of one exchange of this many bytes each way.
void speed(Communicator& world) {
  const int next = (world.rank() + 1) % world.size(), previous = (world.rank() + world.size() - 1) % world.size();
  for (const std::size_t bytes :
       {std::size_t{8}, std::size_t{4096}, std::size_t{1} << 20, std::size_t{4} << 20, std::size_t{16} << 20}) {
    std::vector<char> out(bytes, 1), in(bytes, 0);
    const SendPart send{next, out.data(), bytes};
    const RecvPart receive{previous, in.data(), bytes};
    const int rounds = bytes <= 4096 ? 2000 : static_cast<int>((std::size_t{256} << 20) / bytes);
    double best = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      world.barrier({.verb = "barrier"});
      const auto begin = Clock::now();
      for (int i = 0; i < rounds; ++i) world.exchange({&send, 1}, {&receive, 1}, {.verb = "rotate"});
      best = std::min(best, seconds_since(begin) / rounds);
    }
    if (world.rank() == 0)
      std::printf("%9zu bytes: %9.1f us, %6.2f GB/s each way\n", bytes, best * 1e6, static_cast<double>(bytes) / best / 1e9);
  }
}

// The case with a CUDA device for each rank, joined by NCCL; MPI or TCP is the control communicator.
void on_devices(Communicator& world, double timeout_s, void (*body)(Communicator&)) {
  std::string why;
  const auto devices = static_cast<int>(cuda_devices(why).size());
  require(devices > 0, "no CUDA device: {}", why);
  const DeviceScope scope({DeviceKind::kCuda, static_cast<std::int8_t>(world.rank() % devices)});
  std::vector<int> all(static_cast<std::size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  body(*nccl_world(world.split(all, "world"), NcclOptions::from_environment(timeout_s)));
}

int run(int argc, char** argv) {
  const std::map<std::string, void (*)(Communicator&)> cases{
      {"collectives", collectives},        {"killed", killed},     {"stopped", stopped},    {"error", vanished},
      {"bad_input", bad_input_everywhere}, {"deadlock", deadlock}, {"sizes", sizes_differ}, {"long_compute", long_compute},
      {"waiting", waiting_ranks_sleep},    {"speed", speed}};
  if (argc > 1 && std::strcmp(argv[1], "launch") == 0) {
    const Launch launch = detect_launch();
    std::printf("%s %d/%d %d/%d\n", launch.launcher.c_str(), launch.rank, launch.size, launch.local_rank, launch.local_size);
    return 0;
  }
  std::string_view name = argc > 1 ? argv[1] : "";
  const bool over_nccl = name.starts_with("nccl_");
  if (over_nccl) name.remove_prefix(5);
  const auto wanted = cases.find(std::string(name));
  if (wanted == cases.end()) {
    std::fprintf(stderr, "usage: %s CASE [--timeout SECONDS] [--ranks N]\n", argv[0]);
    return 2;
  }
  JobOptions options;
  for (int i = 2; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--timeout") == 0) options.timeout_s = std::atof(argv[i + 1]);
    if (std::strcmp(argv[i], "--ranks") == 0) options.ranks = std::atoi(argv[i + 1]);
  }
  if (!over_nccl) return run_job(options, wanted->second);
  return run_job(options, [&](Communicator& world) { on_devices(world, options.timeout_s, wanted->second); });
}

}  // namespace
}  // namespace dattn::test

int main(int argc, char** argv) { return dattn::test::run(argc, argv); }
