// Memory of the host's tensors and messages. Fresh pages cost as much as some microseconds of arithmetic each, so freed blocks
// are kept for the next tensor of about that size: a training step or a ring's turn then touches no page for the first time.
// What is kept and in use together never exceeds what was in use at once before. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace dattn {

inline constexpr std::int64_t kHostAlignment = 64;

// At least `bytes` bytes, uninitialised. Throws Error(kSystem) where there is no memory.
void* allocate_on_host(std::int64_t bytes);
// Of memory that allocate_on_host(bytes) gave.
void free_on_host(void* memory, std::int64_t bytes);

// Uninitialised memory of that kind which is no tensor, so that no TensorMeter counts it.
class HostBytes {
 public:
  explicit HostBytes(std::size_t bytes = 0)
      : memory_(bytes > 0 ? allocate_on_host(static_cast<std::int64_t>(bytes)) : nullptr, Free{bytes}) {}
  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  std::size_t size() const { return memory_.get_deleter().bytes; }

 private:
  struct Free {
    std::size_t bytes;
    void operator()(void* memory) const { free_on_host(memory, static_cast<std::int64_t>(bytes)); }
  };
  std::unique_ptr<void, Free> memory_;
};

// Bytes, of blocks that are worth keeping: in use now, kept for later tensors, and the most that was in use at once.
struct HostMemory {
  std::int64_t used = 0, kept = 0, most_used = 0;
};
HostMemory host_memory();

}  // namespace dattn
