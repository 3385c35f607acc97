// NCCL's C interface, as much of it as is used here, in declarations of our own: the library is loaded at run time, so
// building needs no NCCL and one program runs with and without it. tests/parallel/comm/nccl_abi_test.cpp compares every line
// with the real nccl.h at compile time where there is one.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include <climits>

struct ncclComm;

namespace dattn::nccl {

using Comm = ::ncclComm*;
using Stream = void*;  // cudaStream_t
using Window = void*;  // ncclWindow_t

struct UniqueId {
  char internal[128];
};

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum RedOp : int { kSum = 0 };
enum DataType : int { kInt8 = 0, kInt32 = 2, kFloat16 = 6, kFloat32 = 7, kFloat64 = 8, kBfloat16 = 9 };

inline constexpr int kUndefined = INT_MIN;
inline constexpr int kCtaPolicyZero = 2;
inline constexpr int kWindowSymmetric = 1;

// ncclConfig_t of version 2.28. A newer library knows it by its size and version, an older one reads as much of it as it
// knows.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 22800;
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;
  const char* comm_name = nullptr;
  int collnet_enable = kUndefined;
  int cta_policy = kUndefined;
  int shrink_share = kUndefined;
  int nvls_ctas = kUndefined;
  int channels_per_net_peer = kUndefined;
  int nvlink_centric_sched = kUndefined;
};

struct Api {
  int version = 0;   // 22809 is 2.28.9
  std::string path;  // what was loaded

  Result (*get_version)(int* version) = nullptr;
  Result (*get_unique_id)(UniqueId* id) = nullptr;
  Result (*comm_init_rank_config)(Comm* comm, int ranks, UniqueId id, int rank, Config* config) = nullptr;
  Result (*comm_split)(Comm comm, int color, int key, Comm* part, Config* config) = nullptr;
  Result (*comm_finalize)(Comm comm) = nullptr;
  Result (*comm_destroy)(Comm comm) = nullptr;
  Result (*comm_abort)(Comm comm) = nullptr;
  Result (*comm_get_async_error)(Comm comm, Result* error) = nullptr;
  Result (*comm_count)(Comm comm, int* count) = nullptr;
  Result (*comm_user_rank)(Comm comm, int* rank) = nullptr;
  Result (*comm_register)(Comm comm, void* memory, std::size_t bytes, void** handle) = nullptr;
  Result (*comm_deregister)(Comm comm, void* handle) = nullptr;
  Result (*group_start)() = nullptr;
  Result (*group_end)() = nullptr;
  Result (*send)(const void* data, std::size_t count, DataType type, int peer, Comm comm, Stream stream) = nullptr;
  Result (*recv)(void* data, std::size_t count, DataType type, int peer, Comm comm, Stream stream) = nullptr;
  Result (*all_gather)(const void* own, void* all, std::size_t count, DataType type, Comm comm, Stream stream) = nullptr;
  Result (*reduce_scatter)(const void* all, void* own, std::size_t count, DataType type, RedOp op, Comm comm,
                           Stream stream) = nullptr;
  Result (*all_reduce)(const void* in, void* out, std::size_t count, DataType type, RedOp op, Comm comm,
                       Stream stream) = nullptr;
  const char* (*get_error_string)(Result result) = nullptr;
  const char* (*get_last_error)(Comm comm) = nullptr;

  // Since 2.27; nullptr before.
  Result (*mem_alloc)(void** memory, std::size_t bytes) = nullptr;
  Result (*mem_free)(void* memory) = nullptr;
  Result (*comm_window_register)(Comm comm, void* memory, std::size_t bytes, Window* window, int flags) = nullptr;
  Result (*comm_window_deregister)(Comm comm, Window window) = nullptr;
};

inline constexpr int kLeastVersion = 21900;      // 2.19: splits and registered buffers
inline constexpr int kSymmetricVersion = 22700;  // symmetric memory windows
inline constexpr int kZeroCtaVersion = 22800;    // transfers by copy engines
std::string version_text(int version);           // "2.28.9"

// Looks for libnccl.so.2 where NVIDIA's libraries are (core/base/library.h), a host framework's first; DATTN_NCCL=path names
// one. `report` says what was tried and why it was no good; on success, which library was taken.
std::optional<Api> find_nccl(std::string& report);

}  // namespace dattn::nccl

namespace dattn {

struct NcclReport {
  bool found = false;
  std::string version;  // "2.28.9", or nothing
  std::string detail;   // version and path, or what was looked for, where
};
NcclReport probe_nccl();  // for doctor; opens no communicator

}  // namespace dattn
