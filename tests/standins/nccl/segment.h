// The memory that the ranks of one stand-in communicator share: for every pair of ranks and direction a ring of bytes, and
// slots where ranks meet. POSIX shared memory by name, so that ranks may be processes or threads; new memory is zero, which is
// a valid beginning of everything in it.
//
//   | head: size, ranks that have come, slots | ring 0->0 | ring 0->1 | .. | ring P-1->P-1 |
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

namespace standin {

inline constexpr int kMostRanks = 64;
inline constexpr std::size_t kRingBytes = std::size_t{1} << 17;

// One writer, one reader.
struct Ring {
  std::atomic<std::uint64_t> written;
  std::atomic<std::uint64_t> read;
  std::array<char, kRingBytes> bytes;

  std::size_t push(const char* data, std::size_t count);  // what fits; returns how many bytes
  std::size_t pop(char* data, std::size_t count);         // what is there
  std::size_t waiting() const { return written.load(std::memory_order_acquire) - read.load(std::memory_order_relaxed); }
};

// What a rank says when all meet (a split, a window): the number of the meeting, and two values.
struct Slot {
  std::atomic<std::uint64_t> meeting;
  std::int64_t a;
  std::int64_t b;
};

struct Head {
  std::atomic<int> ranks;
  std::atomic<int> joined;
  // Two sets, used in turn: nobody begins meeting n + 2 before all have read n.
  std::array<std::array<Slot, kMostRanks>, 2> slots;
};

class Segment {
 public:
  Segment(std::string name, int ranks);  // maps it, makes it if it is not there; throws std::runtime_error
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  Head& head() { return *static_cast<Head*>(memory_); }
  Ring& ring(int from, int to);
  void join();  // counts this rank in; the last one takes the name away
  bool complete() { return head().joined.load() == ranks_; }

 private:
  std::string name_;
  int ranks_;
  std::size_t bytes_ = 0;
  void* memory_ = nullptr;
};

}  // namespace standin
