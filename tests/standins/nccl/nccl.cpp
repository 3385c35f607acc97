// libnccl_standin.so: the C interface of NCCL (as much as nccl_api.h uses) on host memory, over shared memory between
// processes or threads, so that the production NCCL code runs where there is no GPU. Not fast, and stricter than NCCL: a
// message must be of the kind, type and count that the receiver expects.
//
// Work is enqueued by cudaLaunchHostFunc of whatever CUDA (or stand-in of it) the process has loaded; where there is none,
// or the stream is null, it is done at once. Environment: DATTN_NCCL_FAULT (world.h), DATTN_NCCL_STANDIN_TIMEOUT_S,
// DATTN_NCCL_STANDIN_VERSION (the version it claims, e.g. 21800).
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include <fmt/format.h>

#include "core/base/dtype.h"
#include "tests/standins/nccl/world.h"

using namespace dattn::nccl;  // NOLINT: this file is that interface
using standin::Kind;
using standin::Transfer;
using standin::Work;
using standin::World;

struct ncclComm {
  std::shared_ptr<World> world;  // nullptr in a rank that a split left out
  std::thread joining;

  ~ncclComm() {
    if (joining.joinable()) joining.join();
  }
};

namespace {

using HostFunction = void (*)(void*);
using LaunchHostFunction = int (*)(void* stream, HostFunction function, void* data);

// The module with the CUDA runtime is loaded out of sight of the global scope: all loaded libraries are asked.
LaunchHostFunction launch_host_function() {
  static const auto found = [] {
    void* function = dlsym(RTLD_DEFAULT, "cudaLaunchHostFunc");
    const auto ask = [](dl_phdr_info* info, std::size_t, void* result) {
      void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
      if (library == nullptr) return 0;
      auto& into = *static_cast<void**>(result);
      into = dlsym(library, "cudaLaunchHostFunc");
      dlclose(library);
      return into != nullptr ? 1 : 0;
    };
    if (function == nullptr) dl_iterate_phdr(ask, &function);
    return reinterpret_cast<LaunchHostFunction>(function);
  }();
  return found;
}

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
    case kBfloat16: return 2;
    case kInt32:
    case kFloat32: return 4;
    case kFloat64: return 8;
  }
  return 0;
}

template <class Body>
Result issue(Comm comm, const Body& body, Stream stream) {
  if (comm == nullptr || comm->world == nullptr) return kInvalidArgument;
  World& world = *comm->world;
  if (world.state() == kInProgress) return kInvalidUsage;  // its initialisation has not ended
  if (world.state() != kSuccess) return world.state();
  body(world, t_group.of(comm->world, stream));
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
void reduce(const std::vector<char*>& blocks, void* out, std::size_t count, RedOp op) {
  auto* result = static_cast<T*>(out);
  for (std::size_t i = 0; i < count; ++i) {
    T value{};
    for (std::size_t r = blocks.size(); r-- > 0;) {
      T one;
      std::memcpy(&one, blocks[r] + i * sizeof(T), sizeof one);
      if (r + 1 == blocks.size()) {
        value = one;
      } else {
        const double a = static_cast<double>(value), b = static_cast<double>(one);
        value =
            T(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(op == kSum ? a + b : std::fmax(a, b)));
      }
    }
    result[i] = value;
  }
}

void reduce_blocks(const std::vector<char*>& blocks, void* out, std::size_t count, DataType type, RedOp op) {
  if (type == kFloat32) reduce<float>(blocks, out, count, op);
  if (type == kFloat64) reduce<double>(blocks, out, count, op);
  if (type == kBfloat16) reduce<dattn::BFloat16>(blocks, out, count, op);
}

// stride 0: every rank sends all it has to all (all-reduce); otherwise block r goes to rank r (reduce-scatter).
void add_reduction(World& world, Work& work, const void* in, std::size_t stride, void* out, std::size_t count, DataType type,
                   RedOp op, Kind kind) {
  std::vector<char*> blocks;
  for (int r = 0; r < world.ranks(); ++r) {
    work.buffers.emplace_back(count * size_of(type));
    blocks.push_back(work.buffers.back().data());
  }
  add_all_to_all(world, work, static_cast<const char*>(in), stride, count, type, kind,
                 [&](int r) { return blocks[static_cast<std::size_t>(r)]; });
  work.after.emplace_back([blocks, out, count, type, op] { reduce_blocks(blocks, out, count, type, op); });
}

bool valid(const Config* config) { return config == nullptr || (config->magic == 0xcafebeef && config->size >= 24); }

// Makes the communicator and joins it: in the background unless it is blocking.
Result join(Comm* comm, const std::string& name, int ranks, int rank, bool blocking) {
  try {
    auto made = std::make_unique<ncclComm>();
    made->world = std::make_shared<World>(name, ranks, rank);
    World& world = *made->world;
    world.blocking = blocking;
    if (world.fault().is("init", rank)) return static_cast<Result>(world.fault().number);
    const auto work = [world = made->world] {
      world->join();
      if (!world->aborted()) world->joined();
    };
    if (blocking) {
      work();
    } else {
      made->joining = std::thread(work);
    }
    *comm = made.release();
    return blocking ? (*comm)->world->state() : kInProgress;
  } catch (const std::exception& error) {
    fmt::print(stderr, "stand-in of NCCL: {}\n", error.what());
    return kSystemError;
  }
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
  return join(comm, id.internal, ranks, rank, config == nullptr || config->blocking != 0);
}

// Blocks until all ranks have come, then joins like an initialisation.
Result ncclCommSplit(Comm comm, int color, int key, Comm* part, Config* config) {
  if (comm == nullptr || comm->world == nullptr || !valid(config)) return kInvalidArgument;
  *part = nullptr;
  const auto all = comm->world->meet(color, key);
  if (!all) return kSystemError;
  if (color < 0) return kSuccess;
  int ranks = 0, rank = 0, first = -1;
  for (int r = 0; r < comm->world->ranks(); ++r) {
    const auto& [its_color, its_key] = (*all)[static_cast<std::size_t>(r)];
    if (its_color != color) continue;
    if (first < 0) first = r;
    if (std::pair(its_key, r) < std::pair(static_cast<std::int64_t>(key), comm->world->rank())) ++rank;
    ++ranks;
  }
  const std::string name = fmt::format("{}.{}.{}", comm->world->name(), comm->world->meetings(), first);
  return join(part, name, ranks, rank, config == nullptr || config->blocking != 0);
}

Result ncclCommFinalize(Comm comm) { return comm != nullptr ? kSuccess : kInvalidArgument; }

Result ncclCommDestroy(Comm comm) {
  if (comm != nullptr && comm->world != nullptr && comm->world->state() == kInProgress) comm->world->abort();
  delete comm;
  return kSuccess;
}

Result ncclCommAbort(Comm comm) {
  if (comm == nullptr) return kInvalidArgument;
  if (comm->world != nullptr) comm->world->abort();
  delete comm;
  return kSuccess;
}

Result ncclCommGetAsyncError(Comm comm, Result* error) {
  if (comm == nullptr || comm->world == nullptr) return kInvalidArgument;
  *error = comm->world->state();
  return kSuccess;
}

Result ncclCommCount(Comm comm, int* count) {
  *count = comm->world->ranks();
  return kSuccess;
}

Result ncclCommUserRank(Comm comm, int* rank) {
  *rank = comm->world->rank();
  return kSuccess;
}

Result ncclCommRegister(Comm comm, void* memory, std::size_t bytes, void** handle) {
  if (memory == nullptr || bytes == 0) return kInvalidArgument;
  ++comm->world->registered;
  *handle = memory;
  return kSuccess;
}

Result ncclCommDeregister(Comm comm, void* handle) {
  if (handle == nullptr || comm->world->registered == 0) return kInvalidArgument;
  --comm->world->registered;
  return kSuccess;
}

Result ncclMemAlloc(void** memory, std::size_t bytes) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return *memory != nullptr ? kSuccess : kSystemError;
}

Result ncclMemFree(void* memory) {
  std::free(memory);
  return kSuccess;
}

// All ranks register windows of one size.
Result ncclCommWindowRegister(Comm comm, void* memory, std::size_t bytes, Window* window, int flags) {
  if (std::bit_cast<std::uintptr_t>(memory) % 4096 != 0) return kInvalidArgument;
  const auto all = comm->world->meet(static_cast<std::int64_t>(bytes), flags);
  if (!all) return kSystemError;
  for (const auto& [its_bytes, its_flags] : *all) {
    if (its_bytes != static_cast<std::int64_t>(bytes) || its_flags != flags) return kInvalidUsage;
  }
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
  const auto body = [&](World& world, Work& work) {
    add_reduction(world, work, all, count * size_of(type), own, count, type, op, Kind::kReduceScatter);
  };
  return issue(comm, body, stream);
}

Result ncclAllReduce(const void* in, void* out, std::size_t count, DataType type, RedOp op, Comm comm, Stream stream) {
  const auto body = [&](World& world, Work& work) {
    add_reduction(world, work, in, 0, out, count, type, op, Kind::kAllReduce);
  };
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
  text = comm != nullptr && comm->world != nullptr ? comm->world->last_error() : "";
  return text.c_str();
}
}
