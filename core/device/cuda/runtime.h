// The CUDA module inside: what its files share. Errors are thrown by check (language.h) or fail (core/base/error.h), from .cpp
// files.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <vector>

#include "core/device/cuda_module.h"

namespace dattn::cuda {

// The thread's stream on its current device. Also takes over what the program adds to this thread's errors ("rank 3/8"):
// a kernel's entry calls it first.
cudaStream_t current_stream();

int current_device_index();  // of the thread

// Sets what the program adds to errors of this thread.
void adopt_error_context();

bool host_allows_tf32();  // core/device/tf32.h, of the program

void bind_host(const CudaHost* host);

// The functions of the module's table (cuda_module.h), devices and streams ..
std::vector<CudaDevice> devices(std::string& why);
CudaVersions versions();
void set_device(int index);
void* allocate(std::size_t bytes, NativeStream stream);
void release(void* memory, NativeStream stream) noexcept;
void* allocate_pinned(std::size_t bytes);
void free_pinned(void* memory) noexcept;
void memory_now(std::size_t& free_bytes, std::size_t& total_bytes);
NativeStream make_stream(bool high_priority);
void destroy_stream(NativeStream stream) noexcept;
void synchronize(NativeStream stream);
NativeEvent make_event();
void destroy_event(NativeEvent event) noexcept;
void record(NativeEvent event, NativeStream stream);
void wait_event(NativeStream stream, NativeEvent event);
bool event_done(NativeEvent event);
void synchronize_event(NativeEvent event);
void copy_bytes(void* to, const void* from, std::size_t bytes, NativeStream stream);
void copy_pinned(void* to, const void* from, std::size_t bytes, NativeStream stream);

// .. tensors (core/tensor/tensor.cu) ..
void fill_zero(const TensorView& view, NativeStream stream);
void copy(const TensorView& from, const TensorView& to, NativeStream stream);
void add(const TensorView& from, const TensorView& to, NativeStream stream);
void take_maximum(const TensorView& from, const TensorView& to, NativeStream stream);

// .. and states (core/attention/state.cu).
void clear_state(const TensorView& out, const TensorView& lse, NativeStream stream);
void merge_state(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse,
                 NativeStream stream);
void merge_sink(const TensorView& out, const TensorView& lse, const TensorView& sink, NativeStream stream);
void add_sink_gradient(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink,
                       NativeStream stream);
void attention_delta(const TensorView& dout, const TensorView& out, const TensorView& delta, NativeStream stream);

// Caches (core/attention/cuda/cache_row.cpp).
void store_row(const TensorView& row, std::int64_t at, const TensorView& cache, NativeStream stream);

}  // namespace dattn::cuda
