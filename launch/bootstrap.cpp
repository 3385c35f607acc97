#include "launch/bootstrap.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "parallel/comm/mpi.h"
#include "parallel/comm/tcp.h"
#include "parallel/comm/thread.h"

namespace dattn {
namespace {

using std::chrono::milliseconds;

// The rank whose error counts says it, then ends the job; the others leave it this time to do so before they do.
constexpr milliseconds kOwnGrace{100};
constexpr milliseconds kOthersGrace{1500};

std::optional<int> integer(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return std::nullopt;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  require(*end == '\0' && value >= 0 && value < (1 << 30), "the launcher's variable {} is '{}', not a count", name, text);
  return static_cast<int>(value);
}

// SLURM_STEP_TASKS_PER_NODE, "2(x3),1": tasks of the node with this number.
int slurm_local_size(std::string_view text, int node) {
  while (!text.empty()) {
    const std::string entry(text.substr(0, text.find(',')));
    int tasks = 1, repeat = 1;
    if (std::sscanf(entry.c_str(), "%d(x%d)", &tasks, &repeat) < 1) return 1;
    if (node < repeat) return std::max(1, tasks);
    node -= repeat;
    text.remove_prefix(std::min(text.size(), entry.size() + 1));
  }
  return 1;
}

std::optional<Launch> slurm_launch() {
  if (!integer("SLURM_PROCID") || !(std::getenv("SLURM_STEP_ID") || std::getenv("SLURM_STEPID"))) return std::nullopt;
  const auto step_tasks = integer("SLURM_STEP_NUM_TASKS");
  const auto size = step_tasks ? step_tasks : integer("SLURM_NTASKS");
  if (!size) return std::nullopt;
  const char* step_layout = std::getenv("SLURM_STEP_TASKS_PER_NODE");
  const char* layout = step_layout ? step_layout : std::getenv("SLURM_TASKS_PER_NODE");
  return Launch{*integer("SLURM_PROCID"), *size, integer("SLURM_LOCALID").value_or(0),
                layout ? slurm_local_size(layout, integer("SLURM_NODEID").value_or(0)) : 1, "slurm"};
}

struct Names {
  const char *launcher, *rank, *size, *local_rank, *local_size;
};
constexpr Names kOpenMpi{"openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                         "OMPI_COMM_WORLD_LOCAL_SIZE"};
constexpr Names kTorchrun{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
constexpr Names kPmi{"pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"};

std::optional<Launch> named_launch(const Names& names) {
  const auto rank = integer(names.rank), size = integer(names.size);
  if (!rank || !size) return std::nullopt;
  return Launch{*rank, *size, integer(names.local_rank).value_or(0), integer(names.local_size).value_or(1), names.launcher};
}

// A launcher that binds each rank to cores of its own has divided them already.
int threads_per_rank(const Launch& launch, int wanted) {
  if (wanted > 0) return wanted;
  const int mine = available_cores();
  const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const bool divided = mine <= online / std::max(1, launch.local_size);
  return divided ? mine : std::max(1, mine / std::max(1, launch.local_size));
}

void say(const std::string& text) {
  std::fflush(nullptr);
  const std::string line = "dattn: " + text + "\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line.data(), line.size());
}

struct Failure {
  ErrorCode code = ErrorCode::kInternal;
  std::string text;
};

// What the exception being handled says.
Failure current_failure() {
  try {
    throw;
  } catch (const Error& error) {
    return {error.code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {ErrorCode::kSystem, "out of memory; use a smaller batch, or more ranks along the sequence"};
  } catch (const std::exception& error) {
    return {ErrorCode::kInternal, error.what()};
  } catch (...) {
    return {ErrorCode::kInternal, "an exception of unknown type"};
  }
}

// One rank has failed and the others do not come back: a thread cannot be ended, so the process is.
class StuckThreads {
 public:
  ~StuckThreads() {
    {
      const std::lock_guard lock(mutex_);
      joined_ = true;
    }
    changed_.notify_all();
    if (watch_.joinable()) watch_.join();
  }
  void failed(const Failure& failure) {
    const std::lock_guard lock(mutex_);
    if (watch_.joinable()) return;
    watch_ = std::thread([this, failure] {
      std::unique_lock wait(mutex_);
      if (changed_.wait_for(wait, kOthersGrace, [this] { return joined_; })) return;
      say(failure.text);
      std::_Exit(static_cast<int>(failure.code));
    });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool joined_ = false;
  std::thread watch_;
};

// Ends a job of threads whose device does not come to rest after a failure.
void end_stuck_threads(const JobEnd& end) {
  static std::once_flag once;
  std::call_once(once, [&] {
    say(end.reason);
    std::_Exit(static_cast<int>(end.code));
  });
}

int run_threads(const JobOptions& options, const std::function<void(Communicator&)>& body) {
  StuckThreads stuck;
  DeviceOptions devices = options.devices;
  devices.stuck = end_stuck_threads;
  try {
    run_thread_ranks(options.ranks, {options.timeout_s}, [&](Communicator& world) {
      if (options.threads > 0) set_num_threads(options.threads);
      try {
        run_on_device(devices, world, options.timeout_s, body);
      } catch (...) {
        stuck.failed(current_failure());
        throw;
      }
    });
    return 0;
  } catch (...) {
    const Failure failure = current_failure();
    say(failure.text);
    return static_cast<int>(failure.code);
  }
}

int run_alone(const JobOptions& options, const std::function<void(Communicator&)>& body) {
  if (options.threads > 0) set_num_threads(options.threads);
  try {
    run_on_device(options.devices, *self_communicator(), options.timeout_s, body);
    return 0;
  } catch (...) {
    const Failure failure = current_failure();
    say(failure.text);
    return static_cast<int>(failure.code);
  }
}

// All ranks agree on whose error counts; that one says it and ends the job through the launcher.
int end_processes(Communicator& world, const JobEnd& end) {
  const bool mine = end.rank == world.rank();
  if (mine) say(end.reason);
  std::fflush(nullptr);
  std::this_thread::sleep_for(mine ? kOwnGrace : kOthersGrace);
  const int code = static_cast<int>(end.code);
  world.terminate_job(code);
  return code;
}

int end_processes(Communicator& world, const Failure& failure) {
  world.abort(failure.text, failure.code);
  return end_processes(world, world.job_end());
}

std::unique_ptr<Communicator> join_world(const Launch& launch, const JobOptions& options) {
  if (launch.launcher == "torchrun") {
    const char* host = std::getenv("MASTER_ADDR");
    const auto port = integer("MASTER_PORT"), own_port = integer("DATTN_TCP_PORT");
    require(host && (port || own_port), "torchrun's RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not");
    return tcp_world({host, own_port ? *own_port : *port + 1, launch.rank, launch.size}, {options.timeout_s});
  }
  auto world = mpi_world({options.timeout_s});
  require(world->size() == launch.size,
          "{} started {} ranks but MPI sees {}; start them with the same MPI's mpirun, or with srun --mpi=pmix",
          launch.launcher, launch.size, world->size());
  return world;
}

int run_process(const Launch& launch, const JobOptions& options, const std::function<void(Communicator&)>& body) {
  set_error_context(fmt::format("rank {}/{}", launch.rank, launch.size));
  set_num_threads(threads_per_rank(launch, options.threads));
  std::unique_ptr<Communicator> world;
  try {
    world = join_world(launch, options);
  } catch (...) {
    const Failure failure = current_failure();
    if (launch.rank == 0) say(failure.text);
    return static_cast<int>(failure.code);
  }
  DeviceOptions devices = options.devices;
  devices.stuck = [&world = *world](const JobEnd& end) { std::_Exit(end_processes(world, end)); };
  try {
    run_on_device(devices, whole_group(*world), launch.local_rank, launch.local_size, options.timeout_s, body);
    world->barrier({.verb = "leave"});
  } catch (...) {
    return end_processes(*world, current_failure());
  }
  return 0;
}

}  // namespace

Launch detect_launch() {
  for (const Names& names : {kOpenMpi, kTorchrun}) {
    if (auto launch = named_launch(names)) return *launch;
  }
  if (auto launch = slurm_launch()) return *launch;
  return named_launch(kPmi).value_or(Launch{});
}

int run_job(const JobOptions& options, const std::function<void(Communicator&)>& body) {
  Launch launch;
  try {
    launch = detect_launch();
    require(launch.rank < launch.size, "{}: rank {} of {} ranks; the launcher's variables contradict each other",
            launch.launcher, launch.rank, launch.size);
    require(options.ranks == 0 || launch.launcher.empty() || options.ranks == launch.size,
            "--ranks {} but {} started {}; leave --ranks out under a launcher", options.ranks, launch.launcher, launch.size);
    require(options.ranks >= 0 && options.timeout_s > 0, "--ranks {} and timeout {} s must be positive", options.ranks,
            options.timeout_s);
  } catch (const Error& error) {
    if (launch.rank == 0) say(error.what());
    return error.exit_code();
  }
  if (launch.size > 1) return run_process(launch, options, body);
  return options.ranks > 1 ? run_threads(options, body) : run_alone(options, body);
}

}  // namespace dattn
