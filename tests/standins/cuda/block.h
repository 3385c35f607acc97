// Blocks of a kernel on the host. Every thread of a block is a fiber of one worker and runs until it waits for others
// (barrier, exchange within its warp), so at a given time one runs. A thread that never waits costs a function call.
//
// Refused with a text (the launch ends with cudaErrorLaunchFailure): threads that wait at different barriers or places,
// exchanges within a warp that has lost threads, memory written beside the block's shared memory, misaligned addresses.
// Odd blocks run their threads in reverse order, so that a missing barrier shows in one order or the other; under
// ThreadSanitizer it is a race, because nothing but barriers and exchanges orders the threads of a block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace dattn::cuda::standin {

constexpr int kWarp = 32;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;

struct Launch {
  std::function<void()> thread;  // the kernel with its arguments, as one thread calls it
  dim3 grid, block;
  std::size_t shared_bytes = 0;
};

// Runs one block on the calling OS thread. Empty, or what went wrong.
std::string run_block(const Launch& launch, std::uint64_t block);

// Where in the kernel's source a thread waits: as a default argument, the place of the call.
struct Place {
  const char* file;
  int line;
  constexpr Place(const char* its_file = __builtin_FILE(), int its_line = __builtin_LINE()) : file(its_file), line(its_line) {}
};

// For the calling thread of a block.
unsigned char* shared_memory();
void block_barrier(Place place);

// Waits for all 32 threads of the warp; the last one calls exchange(what the threads brought, by lane).
using Exchange = void (*)(void* const* lanes);
void warp_meet(const char* what, Place place, void* mine, Exchange exchange);

// Gives the launch up; printf's format.
[[noreturn]] void give_up(const char* what, Place place, const char* format, ...) __attribute__((format(printf, 3, 4)));
void want_shared(const void* address, std::size_t bytes, const char* what, Place place);  // 16-byte aligned, in range

// Copies that were started and become visible when they are waited for.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes;
};
void start_copy(const PendingCopy& copy);
void commit_copies();
bool next_due_copy(int pending_groups, PendingCopy& copy);  // false: none is left but the last groups

}  // namespace dattn::cuda::standin

// Threads read these as in a kernel. Not constant: every switch between threads sets threadIdx.
extern thread_local constinit uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern thread_local constinit uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern thread_local constinit dim3 blockDim __attribute__((tls_model("initial-exec")));
extern thread_local constinit dim3 gridDim __attribute__((tls_model("initial-exec")));
