// Memory, copies and fills. Copies from and to pageable memory keep CUDA's rules: what comes from it has been read when the
// call returns, what goes to it has arrived; with pinned memory both happen in the order of the stream.
#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "stream.h"
#include "switch.h"

using namespace dattn::cuda::standin;  // NOLINT: the functions below are named by CUDA

namespace dattn::cuda::standin {
namespace {

struct Allocation {
  std::size_t bytes;
  int device;  // -1: pinned host memory
  bool of_graph = false;
};

struct Blocks {
  std::mutex mutex;
  std::map<std::uintptr_t, Allocation> by_address;
};
Blocks& blocks() {
  static auto* all = new Blocks;
  return *all;
}

std::atomic<std::size_t>& used_bytes(int device) {
  static auto* used = new std::vector<std::atomic<std::size_t>>(64);
  return (*used)[static_cast<std::size_t>(device)];
}

std::size_t total_bytes() {
  const char* text = std::getenv("DATTN_CUDA_STANDIN_MEMORY");
  return text == nullptr ? std::size_t{8} << 30 : static_cast<std::size_t>(std::atoll(text));
}

void* remember(std::size_t bytes, int device, bool of_graph = false) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) return nullptr;
  const std::lock_guard lock(blocks().mutex);
  blocks().by_address[reinterpret_cast<std::uintptr_t>(memory)] = {bytes, device, of_graph};
  return memory;
}

bool forget(void* memory, bool pinned, Allocation& block, bool of_graph = false) {
  const std::lock_guard lock(blocks().mutex);
  const auto found = blocks().by_address.find(reinterpret_cast<std::uintptr_t>(memory));
  if (found == blocks().by_address.end() || (found->second.device < 0) != pinned || found->second.of_graph != of_graph)
    return false;
  block = found->second;
  blocks().by_address.erase(found);
  return true;
}

// The block that holds an address, and where it begins; nothing: pageable memory.
struct Found {
  std::uintptr_t begin = 0;
  Allocation block{};
};
std::optional<Found> find(const void* memory) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::lock_guard lock(blocks().mutex);
  auto after = blocks().by_address.upper_bound(address);
  if (after == blocks().by_address.begin()) return {};
  const auto& [begin, block] = *--after;
  return address < begin + block.bytes ? std::optional<Found>({begin, block}) : std::nullopt;
}

// Refuses ranges that leave their block.
cudaError_t check_range(const void* memory, std::size_t bytes, bool& pageable) {
  const std::optional<Found> found = find(memory);
  pageable = !found;
  if (pageable) return cudaSuccess;
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(memory) - found->begin;
  if (offset + bytes <= found->block.bytes) return cudaSuccess;
  return report(cudaErrorInvalidValue, std::to_string(bytes) + " bytes from byte " + std::to_string(offset) +
                                           " of a block of " + std::to_string(found->block.bytes));
}

struct Rows {
  char* to;
  std::size_t to_pitch;
  const char* from;
  std::size_t from_pitch, width, height;

  void move() const {
    for (std::size_t row = 0; row < height; ++row) std::memcpy(to + row * to_pitch, from + row * from_pitch, width);
  }
};

cudaError_t enqueue_copy(Rows rows, cudaStream_t handle) {
  if (const cudaError_t error = report_lost()) return error;
  if (rows.width == 0 || rows.height == 0) return cudaSuccess;
  CUstream_st& stream = *CUstream_st::of(handle);
  bool from_pageable = false, to_pageable = false;
  const std::size_t last = rows.height - 1;
  if (check_range(rows.from, last * rows.from_pitch + rows.width, from_pageable) != cudaSuccess) return cudaErrorInvalidValue;
  if (check_range(rows.to, last * rows.to_pitch + rows.width, to_pageable) != cudaSuccess) return cudaErrorInvalidValue;
  if (from_pageable || to_pageable) {
    if (const cudaError_t error = refuse_in_capture(stream, "a copy from or to pageable memory")) return error;
  }
  if (from_pageable) {
    auto staged = std::make_shared<std::vector<char>>(rows.width * rows.height);
    Rows{staged->data(), rows.width, rows.from, rows.from_pitch, rows.width, rows.height}.move();
    rows.from = staged->data();
    rows.from_pitch = rows.width;
    stream.push([rows, staged] { rows.move(); });
  } else {
    stream.push([rows] { rows.move(); });
  }
  if (to_pageable) stream.synchronize();
  return cudaSuccess;
}

cudaError_t enqueue_fill(void* memory, std::size_t pitch, int value, std::size_t width, std::size_t height,
                         cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  bool pageable = false;
  if (check_range(memory, (height - 1) * pitch + width, pageable) != cudaSuccess) return cudaErrorInvalidValue;
  if (pageable) return report(cudaErrorInvalidValue, "pageable memory is not filled by a device");
  CUstream_st::of(stream)->push([=] {
    for (std::size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(memory) + row * pitch, value, width);
  });
  return cudaSuccess;
}

}  // namespace

void release_device_memory(void* memory) { std::free(memory); }
void free_of_graph(void* memory) {
  Allocation block{};
  if (!forget(memory, false, block, true)) return;
  used_bytes(block.device).fetch_sub(block.bytes, std::memory_order_relaxed);
  std::free(memory);
}
void poison_freed(void* memory, std::size_t bytes) { poison(memory, bytes); }
void unpoison_freed(void* memory, std::size_t bytes) { unpoison(memory, bytes); }

}  // namespace dattn::cuda::standin

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = total_bytes();
  *free = *total - std::min(*total, used_bytes(current_device()).load(std::memory_order_relaxed));
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int /*device*/) {
  *pool = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t /*pool*/, cudaMemPoolAttr /*attribute*/, void* /*value*/) {
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t handle) {
  *memory = nullptr;
  if (const cudaError_t error = report_lost()) return error;
  if (bytes == 0) return cudaSuccess;
  CUstream_st& stream = *CUstream_st::of(handle);
  auto& used = used_bytes(stream.device());
  if (used.fetch_add(bytes, std::memory_order_relaxed) + bytes > total_bytes()) {
    if (stream.capture == nullptr) stream.synchronize();  // what was freed before may be had now
    if (used.load(std::memory_order_relaxed) > total_bytes()) {
      used.fetch_sub(bytes, std::memory_order_relaxed);
      return report(cudaErrorMemoryAllocation, "out of memory");
    }
  }
  *memory = remember(bytes, stream.device(), stream.capture != nullptr);
  if (*memory == nullptr) return report(cudaErrorMemoryAllocation, "out of memory");
  if (stream.capture != nullptr) stream.capture->blocks.push_back({*memory, bytes});
  stream.push([block = *memory, bytes] { std::memset(block, kFreed, bytes); });
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t handle) {
  if (memory == nullptr) return cudaSuccess;
  CUstream_st& stream = *CUstream_st::of(handle);
  if (stream.capture != nullptr) {
    return stream.capture->free(memory) ? cudaSuccess
                                        : report(cudaErrorInvalidValue, "memory of another time is freed in a capture");
  }
  Allocation block{};
  if (!forget(memory, false, block)) return report(cudaErrorInvalidValue, "cudaFreeAsync of what is not device memory");
  stream.push([=, &stream] {
    stream.retire(memory, block.bytes);
    used_bytes(block.device).fetch_sub(block.bytes, std::memory_order_relaxed);
  });
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  const cudaError_t error = cudaMallocAsync(memory, bytes, nullptr);
  if (error == cudaSuccess) CUstream_st::of(nullptr)->synchronize();
  return error;
}

cudaError_t cudaFree(void* memory) {
  cudaDeviceSynchronize();
  const cudaError_t error = cudaFreeAsync(memory, nullptr);
  CUstream_st::of(nullptr)->synchronize();
  return error;
}

cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  *memory = remember(bytes, -1);
  return *memory != nullptr ? cudaSuccess : report(cudaErrorMemoryAllocation, "out of memory");
}

cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  Allocation block{};
  if (!forget(memory, true, block)) return report(cudaErrorInvalidValue, "cudaFreeHost of what is not pinned memory");
  cudaDeviceSynchronize();
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  const std::optional<Found> found = find(memory);
  *attributes = {cudaMemoryTypeUnregistered, -1};
  if (found) *attributes = {found->block.device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice, found->block.device};
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind /*kind*/, cudaStream_t stream) {
  return enqueue_copy({static_cast<char*>(to), bytes, static_cast<const char*>(from), bytes, bytes, 1}, stream);
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                              std::size_t height, cudaMemcpyKind /*kind*/, cudaStream_t stream) {
  if (to_pitch < width || from_pitch < width) return report(cudaErrorInvalidValue, "a pitch below the width");
  return enqueue_copy({static_cast<char*>(to), to_pitch, static_cast<const char*>(from), from_pitch, width, height}, stream);
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  return enqueue_fill(memory, bytes, value, bytes, 1, stream);
}

cudaError_t cudaMemset2DAsync(void* memory, std::size_t pitch, int value, std::size_t width, std::size_t height,
                              cudaStream_t stream) {
  return enqueue_fill(memory, pitch, value, width, height, stream);
}
