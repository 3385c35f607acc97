#include "tests/standins/nccl/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace standin {

std::size_t Ring::push(const char* data, std::size_t count) {
  const std::uint64_t at = written.load(std::memory_order_relaxed);
  const std::size_t room = kRingBytes - (at - read.load(std::memory_order_acquire));
  count = std::min(count, room);
  const std::size_t begin = at % kRingBytes, first = std::min(count, kRingBytes - begin);
  std::memcpy(bytes.data() + begin, data, first);
  std::memcpy(bytes.data(), data + first, count - first);
  written.store(at + count, std::memory_order_release);
  return count;
}

std::size_t Ring::pop(char* data, std::size_t count) {
  const std::uint64_t at = read.load(std::memory_order_relaxed);
  count = std::min(count, waiting());
  const std::size_t begin = at % kRingBytes, first = std::min(count, kRingBytes - begin);
  std::memcpy(data, bytes.data() + begin, first);
  std::memcpy(data + first, bytes.data(), count - first);
  read.store(at + count, std::memory_order_release);
  return count;
}

Segment::Segment(std::string name, int ranks) : name_(std::move(name)), ranks_(ranks) {
  bytes_ = sizeof(Head) + sizeof(Ring) * static_cast<std::size_t>(ranks) * static_cast<std::size_t>(ranks);
  const int file = shm_open(name_.c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0) throw std::runtime_error("shared memory " + name_ + ": " + std::strerror(errno));
  if (ftruncate(file, static_cast<off_t>(bytes_)) == 0) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  const int error = errno;
  close(file);
  if (memory_ == nullptr || memory_ == MAP_FAILED) {
    throw std::runtime_error("shared memory " + name_ + " of " + std::to_string(bytes_) + " bytes: " + std::strerror(error));
  }
  int none = 0;
  if (!head().ranks.compare_exchange_strong(none, ranks) && none != ranks) {
    munmap(memory_, bytes_);
    throw std::runtime_error("a communicator of " + std::to_string(none) + " ranks is joined as one of " +
                             std::to_string(ranks));
  }
}

Segment::~Segment() {
  if (!complete()) shm_unlink(name_.c_str());
  munmap(memory_, bytes_);
}

Ring& Segment::ring(int from, int to) {
  auto* rings = reinterpret_cast<Ring*>(static_cast<char*>(memory_) + sizeof(Head));
  return rings[static_cast<std::size_t>(from) * static_cast<std::size_t>(ranks_) + static_cast<std::size_t>(to)];
}

void Segment::join() {
  if (head().joined.fetch_add(1) + 1 == ranks_) shm_unlink(name_.c_str());
}

}  // namespace standin
