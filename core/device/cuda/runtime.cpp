// Devices, memory, streams and events by CUDA's runtime.
#include "core/device/cuda/runtime.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_set>

#include "core/base/error.h"
#include "core/device/cuda/language.h"
#include "core/device/cuda/step.h"

namespace dattn::cuda {
namespace {

const CudaHost* g_host = nullptr;

cudaStream_t native(NativeStream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t native_event(NativeEvent event) { return static_cast<cudaEvent_t>(event); }

std::string error_text(cudaError_t error, const char* call) {
  return fmt::format("{}: {} ({})", call, cudaGetErrorString(error), cudaGetErrorName(error));
}

// What is to be done about an error, beginning with "; ", or nothing.
const char* remedy_of(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
      return "; the device is lost to this process: look for Xid in the kernel's log (dmesg), reset the device or leave it out "
             "(CUDA_VISIBLE_DEVICES), and continue from the last checkpoint";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
      return "; all work of this process on the device is lost: either a kernel is wrong (compute-sanitizer says which) or the "
             "device is (Xid in the kernel's log, dmesg)";
    case cudaErrorNoKernelImageForDevice:
      return "; this build has no code for the device: build with DATTN_CUDA_ARCHITECTURES, or use another one";
    default: return "";
  }
}

// Code for NN runs on compute capability N.N and, translated by the driver, on what came later; code for NNa on N.N alone.
bool has_code_for(int major, int minor) {
  for (std::string_view rest = DATTN_CUDA_ARCHITECTURES; !rest.empty();) {
    const std::string one(rest.substr(0, rest.find(',')));
    rest.remove_prefix(std::min(rest.size(), one.size() + 1));
    const int built = std::atoi(one.c_str()), device = 10 * major + minor;
    if (one.back() == 'a' ? device == built : device >= built) return true;
  }
  return false;
}

std::string why_unusable(const cudaDeviceProp& device) {
  if (has_code_for(device.major, device.minor)) return {};
  return fmt::format("compute capability {}.{}, and this build has code for {} only; build with DATTN_CUDA_ARCHITECTURES={}{}",
                     device.major, device.minor, DATTN_CUDA_ARCHITECTURES, device.major, device.minor);
}

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

// The driver is missing or older than the runtime that this build is linked to.
std::string why_driver(cudaError_t error) {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) cudaGetLastError();
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) cudaGetLastError();
  // The oldest driver of each major version, from NVIDIA's table "CUDA toolkit and minimum compatible driver versions".
  const char* least = runtime >= 13000 ? "580" : runtime >= 12000 ? "525" : "450";
  if (driver == 0) {
    return fmt::format(
        "there is no NVIDIA driver (libcuda.so.1 is not found by the loader); install {} or newer, which CUDA {} "
        "needs",
        least, version_text(runtime));
  }
  if (error != cudaErrorInsufficientDriver || driver >= runtime) return error_text(error, "cudaGetDeviceCount");
  return fmt::format(
      "the NVIDIA driver is too old: it knows CUDA {}, this build needs CUDA {}; install driver {} or newer, or build "
      "with an older toolkit",
      version_text(driver), version_text(runtime), least);
}

// Memory that goes back to the device's pool stays there: otherwise every synchronisation would return it to the driver.
void keep_freed_memory(int device) {
  static std::array<std::once_flag, 64> once;
  if (device >= static_cast<int>(once.size())) return;
  std::call_once(once[static_cast<std::size_t>(device)], [&] {
    cudaMemPool_t pool = nullptr;
    check(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
    std::uint64_t everything = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &everything), "cudaMemPoolSetAttribute");
  });
}

[[noreturn]] void fail_out_of_memory(std::size_t bytes) {
  std::size_t free_bytes = 0, total_bytes = 0;
  memory_now(free_bytes, total_bytes);
  adopt_error_context();
  throw OutOfMemory(fmt::format(
      "out of memory on cuda:{}: {} bytes were asked for, {} of {} are free; use a smaller batch, more ranks, or recomputation",
      current_device_index(), bytes, free_bytes, total_bytes));
}

cudaMemoryType type_of(const void* memory) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
  return attributes.type;
}

bool on_device(const void* memory) { return type_of(memory) == cudaMemoryTypeDevice; }

bool staged_at_return(const void* memory) {
  int reads_pageable = 0;
  check(cudaDeviceGetAttribute(&reads_pageable, cudaDevAttrPageableMemoryAccess, current_device_index()),
        "cudaDeviceGetAttribute");
  return type_of(memory) == cudaMemoryTypeUnregistered && reads_pageable == 0;
}

// What is allocated in a pass that puts nothing on the stream: an address that nothing reads or writes, aligned as others.
void* const kOfNoPass = reinterpret_cast<void*>(std::uintptr_t{1} << 12);

// Pinned memory that could not be had and is pageable instead.
struct Pageable {
  std::mutex mutex;
  std::unordered_set<void*> all;
};
Pageable& pageable() {
  static auto* const instance = new Pageable;  // outlives what is freed at exit
  return *instance;
}

}  // namespace

void bind_host(const CudaHost* host) { g_host = host; }

bool host_allows_tf32() { return g_host->tf32_allowed(); }

void adopt_error_context() {
  const std::string& context = g_host->error_context();
  if (context != error_context()) set_error_context(context);
}

cudaStream_t current_stream() {
  adopt_error_context();
  return native(g_host->current_stream());
}

int current_device_index() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been told here
  adopt_error_context();
  int device = -1;
  cudaGetDevice(&device);
  const std::string_view path = file;
  fail(ErrorCode::kSystem, "cuda:{}: {} at {}:{}{}", device, error_text(error, call), path.substr(path.rfind('/') + 1), line,
       remedy_of(error));
}

std::vector<CudaDevice> devices(std::string& why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    why = error != cudaSuccess && error != cudaErrorNoDevice
              ? why_driver(error)
              : "the driver sees no CUDA device (nvidia-smi -L lists them; CUDA_VISIBLE_DEVICES may hide them)";
    return {};
  }
  std::vector<CudaDevice> all;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    const cudaError_t failed = cudaGetDeviceProperties(&properties, i);
    if (failed != cudaSuccess) {
      cudaGetLastError();
      why = fmt::format("device {}: {}", i, error_text(failed, "cudaGetDeviceProperties"));
      return {};
    }
    std::array<char, 32> pci{};
    if (cudaDeviceGetPCIBusId(pci.data(), static_cast<int>(pci.size()), i) != cudaSuccess) cudaGetLastError();
    all.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                   static_cast<std::int64_t>(properties.totalGlobalMem), pci.data(), why_unusable(properties)});
  }
  return all;
}

CudaVersions versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) cudaGetLastError();
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) cudaGetLastError();
  return {driver == 0 ? "" : version_text(driver), version_text(runtime)};
}

void set_device(int index) {
  check(cudaSetDevice(index), "cudaSetDevice");
  keep_freed_memory(index);
}

void* allocate(std::size_t bytes, NativeStream stream) {
  if (only_host()) return kOfNoPass;
  void* memory = nullptr;
  const cudaError_t error = cudaMallocAsync(&memory, bytes, native(stream));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail_out_of_memory(bytes);
  }
  check(error, "cudaMallocAsync");
  return memory;
}

void release(void* memory, NativeStream stream) noexcept {
  if (memory != nullptr && memory != kOfNoPass && cudaFreeAsync(memory, native(stream)) != cudaSuccess) cudaGetLastError();
}

void* allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocHost(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  memory = std::malloc(bytes);
  if (memory == nullptr) {
    adopt_error_context();
    fail(ErrorCode::kSystem, "out of memory: {} bytes of host memory for transfers", bytes);
  }
  const std::lock_guard lock(pageable().mutex);
  pageable().all.insert(memory);
  return memory;
}

void free_pinned(void* memory) noexcept {
  {
    const std::lock_guard lock(pageable().mutex);
    if (pageable().all.erase(memory) > 0) {
      std::free(memory);
      return;
    }
  }
  if (cudaFreeHost(memory) != cudaSuccess) cudaGetLastError();
}

void memory_now(std::size_t& free_bytes, std::size_t& total_bytes) {
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
}

NativeStream make_stream(bool high_priority) {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high_priority ? greatest : least),
        "cudaStreamCreateWithPriority");
  return stream;
}

void destroy_stream(NativeStream stream) noexcept {
  if (cudaStreamDestroy(native(stream)) != cudaSuccess) cudaGetLastError();
}

void synchronize(NativeStream stream) { check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize"); }

NativeEvent make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void destroy_event(NativeEvent event) noexcept {
  if (cudaEventDestroy(native_event(event)) != cudaSuccess) cudaGetLastError();
}

void record(NativeEvent event, NativeStream stream) {
  check(cudaEventRecord(native_event(event), native(stream)), "cudaEventRecord");
}

void wait_event(NativeStream stream, NativeEvent event) {
  check(cudaStreamWaitEvent(native(stream), native_event(event), 0), "cudaStreamWaitEvent");
}

bool event_done(NativeEvent event) {
  const cudaError_t state = cudaEventQuery(native_event(event));
  if (state == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(state, "cudaEventQuery");
  return true;
}

void synchronize_event(NativeEvent event) { check(cudaEventSynchronize(native_event(event)), "cudaEventSynchronize"); }

void copy_pinned(void* to, const void* from, std::size_t bytes, NativeStream stream) {
  if (bytes > 0 && !only_host()) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, native(stream)), "cudaMemcpyAsync");
}

// The runtime itself stages what comes from pageable memory before it returns, but for devices that read it where it is.
void copy_bytes(void* to, const void* from, std::size_t bytes, NativeStream stream) {
  if (bytes > 0 && in_step()) {
    ensure(type_of(from) == cudaMemoryTypeUnregistered, "a step that is captured reads memory of the device back");
    void* const room = step_room(bytes);
    std::memcpy(room, from, bytes);
    return copy_pinned(to, room, bytes, stream);
  }
  copy_pinned(to, from, bytes, stream);
  if (!on_device(to) || (!on_device(from) && !staged_at_return(from))) synchronize(stream);
}

}  // namespace dattn::cuda
