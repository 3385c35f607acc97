#include "core/attention/cuda/upload.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/device/cuda/language.h"
#include "core/device/cuda/step.h"

namespace dattn::cuda {
namespace {

// Pinned memory of one thread. A buffer is used again when the copy out of it has been done.
class Staging {
 public:
  ~Staging() {
    for (const Buffer& buffer : buffers_) {
      cudaEventSynchronize(static_cast<cudaEvent_t>(buffer.copied));
      destroy_event(buffer.copied);
      free_pinned(buffer.memory);
    }
  }

  struct Buffer {
    void* memory;
    std::size_t bytes;
    NativeEvent copied;
    int device;  // of the event
  };

  const Buffer& take(std::size_t bytes) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const auto fits = [&](const Buffer& buffer) { return buffer.device == device && buffer.bytes >= bytes; };
    for (const Buffer& buffer : buffers_) {
      if (fits(buffer) && event_done(buffer.copied)) return buffer;
    }
    const auto first = std::find_if(buffers_.begin(), buffers_.end(), fits);
    if (buffers_.size() >= kMaxBuffers && first != buffers_.end()) {  // the host is far ahead of the device
      synchronize_event(first->copied);
      std::rotate(first, first + 1, buffers_.end());
      return buffers_.back();
    }
    const std::size_t size = std::max(std::bit_ceil(bytes), kLeastBytes);
    void* const memory = allocate_pinned(size);
    buffers_.push_back({memory, size, make_event(), device});
    return buffers_.back();
  }

 private:
  static constexpr std::size_t kMaxBuffers = 32, kLeastBytes = std::size_t{1} << 16;
  std::vector<Buffer> buffers_;
};

}  // namespace

void Upload::send(NativeStream stream) {
  thread_local Staging staging;
  memory_.emplace(bytes_, stream);
  const std::size_t used = parts_.empty() ? 0 : parts_.back().offset + parts_.back().bytes;
  if (used == 0) return;
  const auto fill = [&](void* memory) {
    for (const Part& part : parts_) {
      if (part.bytes > 0) std::memcpy(static_cast<std::byte*>(memory) + part.offset, part.data, part.bytes);
    }
  };
  if (in_step()) {
    void* const room = step_room(used);
    fill(room);
    return copy_pinned(memory_->ptr<void>(), room, used, stream);
  }
  const Staging::Buffer& buffer = staging.take(used);
  fill(buffer.memory);
  copy_pinned(memory_->ptr<void>(), buffer.memory, used, stream);
  record(buffer.copied, stream);
}

}  // namespace dattn::cuda
