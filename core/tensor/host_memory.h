// Memory of the host's tensors. Fresh pages cost as much as some microseconds of arithmetic each, so freed blocks are kept for
// the next tensor of about that size: a training step or a ring's turn then touches no page for the first time. What is
// kept and in use together never exceeds what was in use at once before. Thread-safe.
#pragma once

#include <cstdint>

namespace dattn {

inline constexpr std::int64_t kHostAlignment = 64;

// At least `bytes` bytes, uninitialised. Throws Error(kSystem) where there is no memory.
void* allocate_on_host(std::int64_t bytes);
// Of memory that allocate_on_host(bytes) gave.
void free_on_host(void* memory, std::int64_t bytes);

// Bytes, of blocks that are worth keeping: in use now, kept for later tensors, and the most that was in use at once.
struct HostMemory {
  std::int64_t used = 0, kept = 0, most_used = 0;
};
HostMemory host_memory();

}  // namespace dattn
