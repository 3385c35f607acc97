// A step of a loop as a CUDA graph: what one pass of host code puts on its stream is captured, and later passes that would put
// the same there, but for what they copy from host memory, become one launch.
//
//   pass 1      as ever: libraries choose and load what they need
//   capture     host code, its work into a graph; copies from the host go through pinned memory of the step      graph launched
//   again       host code, which puts nothing on the stream; its copies rewrite that pinned memory               graph launched
//
// What later passes change lies behind those copies alone: memory that a pass allocates is the graph's, at fixed addresses, and
// sizes, strides and addresses of its calls are those of the capture. The caller promises that by a key: passes of equal keys
// put equal work on the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/device/cuda/runtime.h"

namespace dattn::cuda {

// The functions of the module's table. What runs between begin_step and end_step on this thread is one pass.
void* make_step();
void destroy_step(void* step) noexcept;
bool begin_step(void* step, std::span<const std::int64_t> key, NativeStream stream);
void end_step(void* step, NativeStream stream);
void abandon_step(void* step, NativeStream stream) noexcept;

// For those that copy from host memory. in_step: this thread's pass is captured, or again; then step_room gives pinned memory
// of the step for as many bytes, to be filled and copied from (copy_pinned).
bool in_step();
void* step_room(std::size_t bytes);

}  // namespace dattn::cuda
