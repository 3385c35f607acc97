#include "core/tensor/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <list>
#include <mutex>
#include <unordered_map>

#include "core/base/error.h"

namespace dattn {
namespace {

constexpr std::int64_t kHugePage = 2 << 20;
constexpr std::int64_t kLeastKept = 32 << 10;  // smaller blocks are malloc's own, which keeps them
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // so that the sanitizer sees what uses a freed tensor
#else
constexpr bool kKeeps = true;
#endif

bool is_kept(std::int64_t block) { return kKeeps && block >= kLeastKept; }

std::int64_t round_up(std::int64_t bytes, std::int64_t step) { return (bytes + step - 1) / step * step; }

// Sizes of blocks that are kept: eight between a power of two and the next, so that tensors of about one size share blocks.
// Others are as small as can be: a sanitizer sees what lies behind them.
std::int64_t block_bytes(std::int64_t bytes) {
  const std::int64_t least = round_up(std::max(bytes, kHostAlignment), kHostAlignment);
  if (!is_kept(least)) return least;
  const auto power = std::bit_floor(static_cast<std::uint64_t>(least));
  return round_up(least, static_cast<std::int64_t>(power / 8));
}

// Blocks that fill some huge pages begin at one.
void* fresh_block(std::int64_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const std::int64_t alignment = huge ? kHugePage : kHostAlignment;
  void* memory = std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(round_up(bytes, alignment)));
#if defined(MADV_HUGEPAGE)
  if (huge && memory != nullptr) ::madvise(memory, static_cast<std::size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
  return memory;
}

class HostPool {
 public:
  void* take(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    now_.used += bytes;
    now_.most_used = std::max(now_.most_used, now_.used);
    if (const auto same = by_size_.find(bytes); same != by_size_.end() && !same->second.empty()) {
      const auto block = same->second.back();
      same->second.pop_back();
      void* memory = block->memory;
      now_.kept -= bytes;
      by_age_.erase(block);
      return memory;
    }
    drop_until(now_.most_used - now_.used);
    return nullptr;
  }

  void drop_kept() {
    const std::lock_guard lock(mutex_);
    drop_until(0);
  }

  // After a take for which there was no memory.
  void not_taken(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    now_.used -= bytes;
    now_.most_used = now_.used;
  }

  void give(void* memory, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    by_age_.push_back({memory, bytes});
    by_size_[bytes].push_back(std::prev(by_age_.end()));
    now_.used -= bytes;
    now_.kept += bytes;
    drop_until(now_.most_used - now_.used);
  }

  HostMemory state() {
    const std::lock_guard lock(mutex_);
    return now_;
  }

 private:
  struct Block {
    void* memory;
    std::int64_t bytes;
  };

  // The oldest first, until no more than `kept` bytes are.
  void drop_until(std::int64_t kept) {
    while (now_.kept > kept) {
      const Block oldest = by_age_.front();
      by_size_[oldest.bytes].pop_front();
      by_age_.pop_front();
      now_.kept -= oldest.bytes;
      std::free(oldest.memory);
    }
  }

  std::mutex mutex_;
  std::list<Block> by_age_;
  std::unordered_map<std::int64_t, std::deque<std::list<Block>::iterator>> by_size_;  // of each the oldest first
  HostMemory now_;
};

// Lives until the end, since tensors in static storage may be freed after it would be destroyed.
HostPool& pool() {
  static auto* const pool = new HostPool;  // NOLINT: see above
  return *pool;
}

}  // namespace

void* allocate_on_host(std::int64_t bytes) {
  const std::int64_t block = block_bytes(bytes);
  void* memory = is_kept(block) ? pool().take(block) : nullptr;
  if (memory == nullptr) memory = fresh_block(block);
  if (memory != nullptr) return memory;
  if (is_kept(block)) {
    pool().drop_kept();
    memory = fresh_block(block);
    if (memory != nullptr) return memory;
    pool().not_taken(block);
  }
  fail(ErrorCode::kSystem, "out of memory: a tensor of {} bytes; use more ranks or a smaller batch", bytes);
}

void free_on_host(void* memory, std::int64_t bytes) {
  const std::int64_t block = block_bytes(bytes);
  if (is_kept(block))
    pool().give(memory, block);
  else
    std::free(memory);
}

HostMemory host_memory() { return pool().state(); }

}  // namespace dattn
