// Devices, errors, streams and events of the stand-in's runtime.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "stream.h"

using namespace dattn::cuda::standin;  // NOLINT: the functions below are named by CUDA

namespace dattn::cuda::standin {
namespace {

thread_local int t_device = 0;
thread_local cudaError_t t_last = cudaSuccess;
thread_local const Failure* t_text = nullptr;  // of the last error

int device_count() {
  static const int count = [] {
    const char* text = std::getenv("DATTN_CUDA_STANDIN_DEVICES");
    return text == nullptr ? 2 : std::clamp(std::atoi(text), 0, 64);
  }();
  return count;
}

// DATTN_CUDA_STANDIN_DRIVER: the CUDA version that the driver knows, 0 for none; DATTN_CUDA_STANDIN_RUNTIME: that of the
// runtime; DATTN_CUDA_STANDIN_CAPABILITY, as "7.5".
int number_from(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}
constexpr int kVersion = 13000;
int driver_version() { return number_from("DATTN_CUDA_STANDIN_DRIVER", kVersion); }
int runtime_version() { return number_from("DATTN_CUDA_STANDIN_RUNTIME", kVersion); }
bool driver_is_old() { return driver_version() < runtime_version(); }

bool is_device(int device) { return device >= 0 && device < device_count(); }
cudaError_t no_such_device(int device) {
  return report(cudaErrorInvalidDevice, "invalid device ordinal " + std::to_string(device));
}

// Streams that have not been destroyed.
struct Streams {
  std::mutex mutex;
  std::vector<CUstream_st*> all;
};
Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

cudaError_t report(const Failure* failure) {
  if (failure == nullptr) return cudaSuccess;
  t_text = failure;
  return t_last = failure->error;
}

// Calls body(stream) for the device's streams, its own among them.
template <class Body>
void for_streams(const Body& body) {
  body(*CUstream_st::of(nullptr));
  const std::lock_guard lock(streams().mutex);
  for (CUstream_st* stream : streams().all) {
    if (stream->device() == current_device()) body(*stream);
  }
}

struct Name {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr Name kNames[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorECCUncorrectable, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
};
const Name& known(cudaError_t error) {
  return *std::find_if(std::begin(kNames), std::end(kNames) - 1, [&](const Name& entry) { return entry.error == error; });
}

}  // namespace

int current_device() { return t_device; }

cudaError_t report_lost() { return report(lost(t_device)); }

cudaError_t report(cudaError_t error, const std::string& text) {
  static const Failure* const not_ready = keep({cudaErrorNotReady, known(cudaErrorNotReady).text});
  return report(error == cudaErrorNotReady ? not_ready : keep({error, text}));
}

}  // namespace dattn::cuda::standin

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (driver_is_old()) return report(cudaErrorInsufficientDriver, known(cudaErrorInsufficientDriver).text);
  *count = device_count();
  return *count > 0 ? cudaSuccess : report(cudaErrorNoDevice, known(cudaErrorNoDevice).text);
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return no_such_device(device);
  t_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = t_device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!is_device(device)) return no_such_device(device);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "CUDA stand-in (host memory)");
  std::size_t free = 0;
  cudaMemGetInfo(&free, &properties->totalGlobalMem);
  properties->major = 9;
  if (const char* text = std::getenv("DATTN_CUDA_STANDIN_CAPABILITY")) {
    std::sscanf(text, "%d.%d", &properties->major, &properties->minor);
  }
  properties->multiProcessorCount = 132;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return no_such_device(device);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(kMaxSharedBytes); return cudaSuccess;
    case cudaDevAttrPageableMemoryAccess: *value = 0; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
  }
  return report(cudaErrorInvalidValue, "an attribute that the stand-in does not have");
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  if (!is_device(device)) return no_such_device(device);
  std::snprintf(text, static_cast<std::size_t>(size), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version();
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = runtime_version();
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Failure* failure = nullptr;
  for_streams([&](CUstream_st& stream) {
    stream.synchronize();
    if (const Failure* mine = stream.take_failure()) failure = mine;
  });
  return report(failure);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned /*flags*/, int /*priority*/) {
  *stream = new CUstream_st(t_device);
  const std::lock_guard lock(streams().mutex);
  streams().all.push_back(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard lock(streams().mutex);
    auto& all = streams().all;
    const auto found = std::find(all.begin(), all.end(), stream);
    if (found == all.end()) return report(cudaErrorInvalidResourceHandle, "cudaStreamDestroy of what is not a stream");
    all.erase(found);
  }
  stream->finish();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CUstream_st& own = *CUstream_st::of(stream);
  if (const cudaError_t error = refuse_in_capture(own, "cudaStreamSynchronize")) return error;
  own.synchronize();
  return report(own.take_failure());
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  CUstream_st& own = *CUstream_st::of(stream);
  if (!own.idle()) return report(cudaErrorNotReady, known(cudaErrorNotReady).text);
  return report(own.take_failure());
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned /*flags*/) {
  if (event->recorded == 0) return cudaSuccess;
  if (const cudaError_t error = refuse_in_capture(*CUstream_st::of(stream), "cudaStreamWaitEvent")) return error;
  CUstream_st::of(stream)->push([state = event->state, target = event->recorded] { state->progress.wait_for(target); });
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  if (const cudaError_t error = refuse_in_capture(*CUstream_st::of(stream), "cudaLaunchHostFunc")) return error;
  CUstream_st::of(stream)->push([=] { function(argument); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  *event = new CUevent_st{t_device};
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  CUstream_st& stream = *CUstream_st::of(handle);
  if (const cudaError_t error = refuse_in_capture(stream, "cudaEventRecord")) return error;
  if (stream.device() != event->device) {
    return report(cudaErrorInvalidResourceHandle, "an event of device " + std::to_string(event->device) +
                                                      " is recorded on a stream of device " + std::to_string(stream.device()));
  }
  stream.push(
      [state = event->state, target = ++event->recorded, &stream] {
        const Failure* const always = lost(stream.device());
        state->failure.store(always != nullptr ? always : stream.failure.load());
        state->time_ns.store(std::chrono::steady_clock::now().time_since_epoch().count(), std::memory_order_relaxed);
        state->progress.reach(target);
      },
      false);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!event->state->progress.reached(event->recorded)) return report(cudaErrorNotReady, known(cudaErrorNotReady).text);
  return report(event->state->failure.load());
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  event->state->progress.wait_for(event->recorded);
  return report(event->state->failure.load());
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (start->recorded == 0 || end->recorded == 0) return report(cudaErrorInvalidResourceHandle, "an event without a record");
  if (cudaEventQuery(start) == cudaErrorNotReady || cudaEventQuery(end) == cudaErrorNotReady) return cudaErrorNotReady;
  *milliseconds = static_cast<float>(end->state->time_ns.load() - start->state->time_ns.load()) * 1e-6f;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  if (t_last == cudaSuccess) {
    for_streams([&](CUstream_st& stream) {
      if (t_last == cudaSuccess) report(stream.take_failure());
    });
  }
  return std::exchange(t_last, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const cudaError_t error = cudaGetLastError();
  return t_last = error;
}

const char* cudaGetErrorName(cudaError_t error) { return known(error).name; }

const char* cudaGetErrorString(cudaError_t error) {
  return t_text != nullptr && t_text->error == error ? t_text->text.c_str() : known(error).text;
}
