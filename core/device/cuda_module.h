// The CUDA module: everything that needs CUDA's runtime, kernels included, in a library of its own, libdattn_cuda.so, that is
// loaded when a CUDA device is first asked for. So one program works with and without a driver, and is built with and without
// a toolkit. The tests have a second build of the same sources that runs on host memory (tests/standins/cuda).
//
// The module is described by one table. Functions work on the calling thread's CUDA device, in order on `stream`
// (cudaStream_t), and throw Error. Views are on that device and have been checked by the caller.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "core/attention/kernel.h"
#include "core/device/device.h"
#include "core/tensor/tensor.h"

namespace dattn {

struct CudaNn;

using NativeStream = void*;  // cudaStream_t
using NativeEvent = void*;   // cudaEvent_t

// As "13.0", of CUDA: what the driver knows (empty where there is none), and the runtime that the module was built with.
struct CudaVersions {
  std::string driver, runtime;
};

struct CudaModule {
  int version = 0;
  const char* flavour = "";  // "cuda", or the stand-in's name

  // Devices. `devices` never throws: `why` says what is missing where there is none.
  std::vector<CudaDevice> (*devices)(std::string& why);
  CudaVersions (*versions)();
  void (*set_device)(int index);

  // Memory: a stream-ordered pool for each device; pinned host memory falls back to pageable.
  void* (*allocate)(std::size_t bytes, NativeStream stream);
  void (*free)(void* memory, NativeStream stream) noexcept;
  void* (*allocate_pinned)(std::size_t bytes);
  void (*free_pinned)(void* memory) noexcept;
  void (*memory_now)(std::size_t& free_bytes, std::size_t& total_bytes);

  // Streams and events.
  NativeStream (*make_stream)(bool high_priority);
  void (*destroy_stream)(NativeStream stream) noexcept;
  void (*synchronize)(NativeStream stream);
  NativeEvent (*make_event)();
  void (*destroy_event)(NativeEvent event) noexcept;
  void (*record)(NativeEvent event, NativeStream stream);
  void (*wait_event)(NativeStream stream, NativeEvent event);
  bool (*event_done)(NativeEvent event);
  void (*synchronize_event)(NativeEvent event);

  // Steps as graphs (core/device/step_graph.h, core/device/cuda/step.h). begin_step: is the pass a launch of what was captured?
  void* (*make_step)();
  void (*destroy_step)(void* step) noexcept;
  bool (*begin_step)(void* step, std::span<const std::int64_t> key, NativeStream stream);
  void (*end_step)(void* step, NativeStream stream);
  void (*abandon_step)(void* step, NativeStream stream) noexcept;

  // Tensors (core/tensor/tensor.h). Bytes go between host and device in any direction; host memory that is read may be written
  // again at the return, host memory that is written has been. copy_pinned: only in order
  // on the stream, for memory of allocate_pinned.
  void (*copy_bytes)(void* to, const void* from, std::size_t bytes, NativeStream stream);
  void (*copy_pinned)(void* to, const void* from, std::size_t bytes, NativeStream stream);
  void (*fill_zero)(const TensorView& view, NativeStream stream);
  void (*copy)(const TensorView& from, const TensorView& to, NativeStream stream);
  void (*add)(const TensorView& from, const TensorView& to, NativeStream stream);
  void (*take_maximum)(const TensorView& from, const TensorView& to, NativeStream stream);

  // States (core/attention/state.h).
  void (*clear_state)(const TensorView& out, const TensorView& lse, NativeStream stream);
  void (*merge_state)(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse,
                      NativeStream stream);
  void (*merge_sink)(const TensorView& out, const TensorView& lse, const TensorView& sink, NativeStream stream);
  void (*add_sink_gradient)(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink,
                            NativeStream stream);
  void (*attention_delta)(const TensorView& dout, const TensorView& out, const TensorView& delta, NativeStream stream);

  void (*store_row)(const TensorView& row, std::int64_t at, const TensorView& cache, NativeStream stream);  // cache_row.h

  // Attention kernels, best first; their work goes on the thread's current stream (CudaHost).
  std::span<const AttentionKernel* const> (*kernels)();
  std::string (*cudnn_version)();  // of what kernel `cudnn` calls, as "9.19.0"; empty where it can call nothing

  const CudaNn* nn = nullptr;       // the layers' operations (core/nn/cuda_nn.h)
  std::string (*matmul_library)();  // path and version of cuBLASLt, or why the plain kernel serves
};

inline constexpr int kCudaModuleVersion = 6;

// What the module asks of the program: so that its errors carry the rank, its kernels the thread's stream, and its precision
// is what the program allows (core/device/tf32.h).
struct CudaHost {
  const std::string& (*error_context)();
  NativeStream (*current_stream)();
  bool (*tf32_allowed)();
};

// The module, loaded at the first call: DATTN_CUDA_MODULE=path, else libdattn_cuda.so beside the program (../lib, lib, .), else
// by the loader's paths. Throws Error(kSystem) saying where it was looked for.
const CudaModule& cuda_module();

// The same without throwing, for doctor and tests: nullptr, and why.
const CudaModule* find_cuda_module(std::string& why);

// None, and why, where there is no module, driver or device. They are asked for once: scopes of devices are opened often.
const std::vector<CudaDevice>& cuda_devices(std::string& why);

}  // namespace dattn
