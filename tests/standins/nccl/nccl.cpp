// libnccl_standin.so: the C interface of NCCL (as much as nccl_api.h uses) on host memory, over shared memory between
// processes or threads, so that the production NCCL code runs where there is no GPU. Not fast, and stricter than NCCL: a
// message must be of the kind, type and count that the receiver expects.
//
// Work is enqueued by cudaLaunchHostFunc of whatever CUDA (or stand-in of it) the process has loaded; where there is none,
// or the stream is null, it is done at once. Environment: DATTN_NCCL_FAULT (world.h), DATTN_NCCL_STANDIN_TIMEOUT_S,
// DATTN_NCCL_STANDIN_VERSION (the version it claims, e.g. 21800), NCCL_DEBUG=INFO.
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include <fmt/format.h>

#include "core/base/dtype.h"
#include "tests/standins/cuda_function.h"
#include "tests/standins/nccl/world.h"

using namespace dattn::nccl;  // NOLINT: this file is that interface
using standin::cuda_function;
using standin::Kind;
using standin::launch_host_function;
using standin::Transfer;
using standin::Work;
using standin::World;

struct ncclComm {
  ~ncclComm() {
    if (joining.joinable()) joining.join();
  }
  std::shared_ptr<World> world() const {  // nullptr until it is known which one it is
    const std::lock_guard lock(mutex);
    return made;
  }
  void set(const std::shared_ptr<World>& world) {
    const std::lock_guard lock(mutex);
    made = world;
    if (aborted) world->abort();
  }
  void fail(Result result) { failed = result; }
  Result state() const {
    const auto one = world();
    return failed != kSuccess ? failed.load() : one == nullptr ? kInProgress : one->state();
  }
  void abort() {
    const std::lock_guard lock(mutex);
    aborted = true;
    if (made != nullptr) made->abort();
  }

  std::thread joining;

 private:
  mutable std::mutex mutex;
  std::shared_ptr<World> made;
  bool aborted = false;
  std::atomic<Result> failed{kSuccess};
};

namespace {

struct Enqueued {
  std::shared_ptr<World> world;
  Work work;
};

void enqueue(std::shared_ptr<World> world, Work work, Stream stream) {
  if (stream == nullptr || launch_host_function() == nullptr) return world->run(work);
  auto* data = new Enqueued{std::move(world), std::move(work)};
  launch_host_function()(
      stream,
      [](void* argument) {
        const std::unique_ptr<Enqueued> one(static_cast<Enqueued*>(argument));
        one->world->run(one->work);
      },
      data);
}

// The open group of a thread: one piece of work for each communicator and stream.
struct Group {
  struct Entry {
    std::shared_ptr<World> world;
    Stream stream;
    Work work;
  };
  int depth = 0;
  std::vector<Entry> entries;

  Work& of(const std::shared_ptr<World>& world, Stream stream) {
    for (Entry& entry : entries) {
      if (entry.world == world && entry.stream == stream) return entry.work;
    }
    entries.push_back({world, stream, {}});
    return entries.back().work;
  }
  Result close() {
    Result result = kSuccess;
    for (Entry& entry : entries) {
      // The first use connects the ranks, which a non-blocking communicator does in the background.
      if (!entry.world->used.exchange(true) && !entry.world->blocking) result = kInProgress;
      enqueue(std::move(entry.world), std::move(entry.work), entry.stream);
    }
    entries.clear();
    return result;
  }
};
thread_local Group t_group;

std::size_t size_of(DataType type) {
  switch (type) {
    case kInt8: return 1;
    case kFloat16: return 2;
    case kBfloat16: return 2;
    case kInt32:
    case kFloat32: return 4;
    case kFloat64: return 8;
  }
  return 0;
}

template <class Body>
Result issue(Comm comm, const Body& body, Stream stream) {
  if (comm == nullptr) return kInvalidArgument;
  if (comm->state() == kInProgress) return kInvalidUsage;  // its initialisation has not ended
  if (comm->state() != kSuccess) return comm->state();
  const auto world = comm->world();
  body(*world, t_group.of(world, stream));
  return t_group.depth > 0 ? kSuccess : t_group.close();
}

void add(World& world, Work& work, bool sending, int peer, const void* data, std::size_t count, DataType type, Kind kind) {
  auto* bytes = static_cast<char*>(const_cast<void*>(data));
  Transfer transfer{sending, peer, bytes, count * size_of(type), {kind, type, count}};
  world.enlist(transfer);
  work.transfers.push_back(transfer);
}

// All ranks exchange blocks: block r of `from` (or the only one) goes to rank r; rank r's arrives at into(r).
void add_all_to_all(World& world, Work& work, const char* from, std::size_t stride, std::size_t count, DataType type, Kind kind,
                    const std::function<char*(int)>& into) {
  const int me = world.rank();
  for (int r = 0; r < world.ranks(); ++r) {
    const char* block = from + static_cast<std::size_t>(r) * stride;
    if (r == me) {
      char* own = into(r);
      work.before.emplace_back([own, block, bytes = count * size_of(type)] { std::memmove(own, block, bytes); });
    } else {
      add(world, work, true, r, block, count, type, kind);
      add(world, work, false, r, into(r), count, type, kind);
    }
  }
}

// From the highest rank down: NCCL promises no order, so nobody may rely on rank order.
template <class T>
void reduce(const std::vector<char*>& blocks, void* out, std::size_t count) {
  auto* result = static_cast<T*>(out);
  for (std::size_t i = 0; i < count; ++i) {
    T value{};
    for (std::size_t r = blocks.size(); r-- > 0;) {
      T one;
      std::memcpy(&one, blocks[r] + i * sizeof(T), sizeof one);
      if (r + 1 == blocks.size()) {
        value = one;
      } else {
        const double sum = static_cast<double>(value) + static_cast<double>(one);
        value = T(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(sum));
      }
    }
    result[i] = value;
  }
}

void reduce_blocks(const std::vector<char*>& blocks, void* out, std::size_t count, DataType type) {
  if (type == kFloat32) reduce<float>(blocks, out, count);
  if (type == kFloat64) reduce<double>(blocks, out, count);
  if (type == kFloat16) reduce<dattn::Float16>(blocks, out, count);
  if (type == kBfloat16) reduce<dattn::BFloat16>(blocks, out, count);
}

// stride 0: every rank sends all it has to all (all-reduce); otherwise block r goes to rank r (reduce-scatter).
void add_reduction(World& world, Work& work, const void* in, std::size_t stride, void* out, std::size_t count, DataType type,
                   Kind kind) {
  std::vector<char*> blocks;
  for (int r = 0; r < world.ranks(); ++r) {
    work.buffers.emplace_back(count * size_of(type));
    blocks.push_back(work.buffers.back().data());
  }
  add_all_to_all(world, work, static_cast<const char*>(in), stride, count, type, kind,
                 [&](int r) { return blocks[static_cast<std::size_t>(r)]; });
  work.after.emplace_back([blocks, out, count, type] { reduce_blocks(blocks, out, count, type); });
}

constexpr std::uintptr_t kPage = 4096;

struct Blocks {
  std::mutex mutex;
  std::map<void*, void*> of_memory;
};
Blocks& blocks() {
  static Blocks all;
  return all;
}

// With NCCL_DEBUG=INFO, as NCCL does: what it was asked for.
template <class... Args>
void tell(fmt::format_string<Args...> format, Args&&... args) {
  const char* wanted = std::getenv("NCCL_DEBUG");
  if (wanted != nullptr && std::string_view(wanted) == "INFO")
    fmt::print(stderr, "NCCL INFO {}\n", fmt::format(format, std::forward<Args>(args)...));
}

void tell(const Config* config) {
  if (config != nullptr && config->comm_name != nullptr)
    tell("{}: max_ctas {}, cta_policy {}", config->comm_name, config->max_ctas, config->cta_policy);
}

bool valid(const Config* config) { return config == nullptr || (config->magic == 0xcafebeef && config->size >= 24); }

// Makes the communicator and joins it: in the background unless it is blocking.
Result join(Comm* comm, const std::function<std::shared_ptr<World>()>& make, bool blocking) {
  auto made = std::make_unique<ncclComm>();
  const auto work = [make, blocking, into = made.get()] {
    try {
      const auto world = make();
      if (world == nullptr) return into->fail(kSystemError);
      world->blocking = blocking;
      if (world->fault().is("init", world->rank())) return into->fail(static_cast<Result>(world->fault().number));
      into->set(world);
      world->join();
      if (!world->aborted()) world->joined();
    } catch (const std::exception& error) {
      fmt::print(stderr, "stand-in of NCCL: {}\n", error.what());
      into->fail(kSystemError);
    }
  };
  if (blocking) {
    work();
  } else {
    made->joining = std::thread(work);
  }
  *comm = made.release();
  return blocking ? (*comm)->state() : kInProgress;
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) {
  const char* claimed = std::getenv("DATTN_NCCL_STANDIN_VERSION");
  *version = claimed != nullptr ? std::atoi(claimed) : 22809;
  return kSuccess;
}

Result ncclGetUniqueId(UniqueId* id) {
  static std::atomic<unsigned> count{0};
  const std::string name = fmt::format("/dattn_nccl_{}_{}_{:08x}", getpid(), count++, std::random_device()());
  *id = {};
  std::memcpy(id->internal, name.c_str(), name.size());
  return kSuccess;
}

Result ncclCommInitRankConfig(Comm* comm, int ranks, UniqueId id, int rank, Config* config) {
  if (!valid(config) || rank < 0 || rank >= ranks || ranks > standin::kMostRanks) return kInvalidArgument;
  id.internal[sizeof id.internal - 1] = '\0';
  tell(config);
  const auto make = [name = std::string(id.internal), ranks, rank] { return std::make_shared<World>(name, ranks, rank); };
  return join(comm, make, config == nullptr || config->blocking != 0);
}

Result ncclCommSplit(Comm comm, int color, int key, Comm* part, Config* config) {
  if (comm == nullptr || comm->state() != kSuccess || !valid(config)) return kInvalidArgument;
  *part = nullptr;
  const auto parent = comm->world();
  if (color < 0) return parent->meet(color, key) ? kSuccess : kSystemError;
  // Which ranks have this colour is known when all have come.
  const auto make = [parent, color, key]() -> std::shared_ptr<World> {
    const auto all = parent->meet(color, key);
    if (!all) return nullptr;
    int ranks = 0, rank = 0, first = -1;
    for (int r = 0; r < parent->ranks(); ++r) {
      const auto& [its_color, its_key] = (*all)[static_cast<std::size_t>(r)];
      if (its_color != color) continue;
      if (first < 0) first = r;
      if (std::pair(its_key, r) < std::pair(static_cast<std::int64_t>(key), parent->rank())) ++rank;
      ++ranks;
    }
    return std::make_shared<World>(fmt::format("{}.{}.{}", parent->name(), parent->meetings(), first), ranks, rank);
  };
  return join(part, make, config == nullptr || config->blocking != 0);
}

Result ncclCommFinalize(Comm comm) { return comm != nullptr ? kSuccess : kInvalidArgument; }

Result ncclCommDestroy(Comm comm) {
  if (comm != nullptr && comm->state() == kInProgress) comm->abort();
  delete comm;
  return kSuccess;
}

Result ncclCommAbort(Comm comm) {
  if (comm == nullptr) return kInvalidArgument;
  comm->abort();
  delete comm;
  return kSuccess;
}

Result ncclCommGetAsyncError(Comm comm, Result* error) {
  if (comm == nullptr) return kInvalidArgument;
  *error = comm->state();
  return kSuccess;
}

Result ncclCommCount(Comm comm, int* count) {
  *count = comm->world()->ranks();
  return kSuccess;
}

Result ncclCommUserRank(Comm comm, int* rank) {
  *rank = comm->world()->rank();
  return kSuccess;
}

Result ncclCommRegister(Comm comm, void* memory, std::size_t bytes, void** handle) {
  if (memory == nullptr || bytes == 0) return kInvalidArgument;
  tell("registers {} bytes", bytes);
  ++comm->world()->registered;
  *handle = memory;
  return kSuccess;
}

Result ncclCommDeregister(Comm comm, void* handle) {
  if (handle == nullptr || comm->world()->registered == 0) return kInvalidArgument;
  --comm->world()->registered;
  return kSuccess;
}

// Memory of the device, at a page's beginning.
Result ncclMemAlloc(void** memory, std::size_t bytes) {
  const auto allocate = reinterpret_cast<int (*)(void**, std::size_t)>(cuda_function("cudaMalloc"));
  void* block = nullptr;
  if (allocate == nullptr || allocate(&block, bytes + kPage) != 0) return kUnhandledCudaError;
  *memory = std::bit_cast<void*>((std::bit_cast<std::uintptr_t>(block) + kPage - 1) / kPage * kPage);
  const std::lock_guard lock(blocks().mutex);
  blocks().of_memory[*memory] = block;
  return kSuccess;
}

Result ncclMemFree(void* memory) {
  const auto release = reinterpret_cast<int (*)(void*)>(cuda_function("cudaFree"));
  const std::lock_guard lock(blocks().mutex);
  const auto block = blocks().of_memory.extract(memory);
  return release != nullptr && !block.empty() && release(block.mapped()) == 0 ? kSuccess : kInvalidArgument;
}

// All ranks register windows of one size.
Result ncclCommWindowRegister(Comm comm, void* memory, std::size_t bytes, Window* window, int flags) {
  if (std::bit_cast<std::uintptr_t>(memory) % kPage != 0) return kInvalidArgument;
  const auto all = comm->world()->meet(static_cast<std::int64_t>(bytes), flags);
  if (!all) return kSystemError;
  for (const auto& [its_bytes, its_flags] : *all) {
    if (its_bytes != static_cast<std::int64_t>(bytes) || its_flags != flags) return kInvalidUsage;
  }
  tell("window of {} bytes", bytes);
  *window = memory;
  return kSuccess;
}

Result ncclCommWindowDeregister(Comm, Window) { return kSuccess; }

Result ncclGroupStart() {
  ++t_group.depth;
  return kSuccess;
}

Result ncclGroupEnd() {
  if (t_group.depth == 0) return kInvalidUsage;
  return --t_group.depth > 0 ? kSuccess : t_group.close();
}

Result ncclSend(const void* data, std::size_t count, DataType type, int peer, Comm comm, Stream stream) {
  return issue(
      comm, [&](World& world, Work& work) { add(world, work, true, peer, data, count, type, Kind::kPointToPoint); }, stream);
}

Result ncclRecv(void* data, std::size_t count, DataType type, int peer, Comm comm, Stream stream) {
  return issue(
      comm, [&](World& world, Work& work) { add(world, work, false, peer, data, count, type, Kind::kPointToPoint); }, stream);
}

Result ncclAllGather(const void* own, void* all, std::size_t count, DataType type, Comm comm, Stream stream) {
  const auto body = [&](World& world, Work& work) {
    add_all_to_all(world, work, static_cast<const char*>(own), 0, count, type, Kind::kAllGather,
                   [&](int r) { return static_cast<char*>(all) + static_cast<std::size_t>(r) * count * size_of(type); });
  };
  return issue(comm, body, stream);
}

Result ncclReduceScatter(const void* all, void* own, std::size_t count, DataType type, RedOp op, Comm comm, Stream stream) {
  if (op != kSum) return kInvalidArgument;
  const auto body = [&](World& world, Work& work) {
    add_reduction(world, work, all, count * size_of(type), own, count, type, Kind::kReduceScatter);
  };
  return issue(comm, body, stream);
}

Result ncclAllReduce(const void* in, void* out, std::size_t count, DataType type, RedOp op, Comm comm, Stream stream) {
  if (op != kSum) return kInvalidArgument;
  const auto body = [&](World& world, Work& work) { add_reduction(world, work, in, 0, out, count, type, Kind::kAllReduce); };
  return issue(comm, body, stream);
}

const char* ncclGetErrorString(Result result) {
  switch (result) {
    case kSuccess: return "no error";
    case kUnhandledCudaError: return "unhandled cuda error";
    case kSystemError: return "unhandled system error";
    case kInternalError: return "internal error";
    case kInvalidArgument: return "invalid argument";
    case kInvalidUsage: return "invalid usage";
    case kRemoteError: return "remote process exited or there was a network error";
    case kInProgress: return "operation in progress";
  }
  return "unknown result code";
}

const char* ncclGetLastError(Comm comm) {
  thread_local std::string text;
  const auto world = comm != nullptr ? comm->world() : nullptr;
  text = world != nullptr ? world->last_error() : "";
  return text.c_str();
}
}
