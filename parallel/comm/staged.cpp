#include "parallel/comm/staged.h"

#include <bit>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"
#include "parallel/comm/decorator.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

// Pinned host memory in sizes of powers of two, kept for the next transfer. A buffer that a device may still read comes back
// with the event after which it does not.
class PinnedPool {
 public:
  PinnedPool() = default;
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;
  ~PinnedPool() {
    for (Free& buffer : free_) {
      try {
        if (buffer.read) buffer.read->synchronize();
      } catch (const Error&) {
        // A device that failed reads nothing any more.
      }
      cuda_module().free_pinned(buffer.data);
    }
  }

  std::byte* take(std::size_t bytes) {
    const std::size_t room = room_for(bytes);
    const std::lock_guard lock(mutex_);
    for (auto buffer = free_.begin(); buffer != free_.end(); ++buffer) {
      if (buffer->room != room || (buffer->read && !buffer->read->done())) continue;
      std::byte* data = buffer->data;
      free_.erase(buffer);
      return data;
    }
    return static_cast<std::byte*>(cuda_module().allocate_pinned(room));
  }
  void give(std::byte* data, std::size_t bytes, std::shared_ptr<Event> read) {
    const std::lock_guard lock(mutex_);
    free_.push_back({data, room_for(bytes), std::move(read)});
  }

 private:
  struct Free {
    std::byte* data = nullptr;
    std::size_t room = 0;
    std::shared_ptr<Event> read;
  };
  static std::size_t room_for(std::size_t bytes) { return std::bit_ceil(std::max(bytes, std::size_t{4096})); }

  std::mutex mutex_;
  std::vector<Free> free_;
};

// What all groups of one rank share.
struct Staging {
  PinnedPool pool;
  std::mutex mutex;
  std::map<int, Stream> streams;  // by device index

  const Stream& stream(Device device) {
    const std::lock_guard lock(mutex);
    return streams.try_emplace(device.index, device).first->second;
  }
};

class Staged final : public Decorator {
 public:
  Staged(std::unique_ptr<Communicator> inner, std::shared_ptr<Staging> staging)
      : Decorator(std::move(inner)), staging_(std::move(staging)) {}
  ~Staged() override {
    inner_.reset();  // moves nothing into the buffers any more
    for (auto& [ticket, transfer] : running_) give_back(transfer, nullptr);
  }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    const Device device = check_parts(sends, receives, rank(), size(), label);
    if (!device.is_cuda()) return inner_->start(sends, receives, label);
    copy_own_part(sends, receives, rank());
    Transfer transfer;
    transfer.device = device;
    std::vector<SendPart> out = on_host<SendPart>(sends, transfer.sent);
    std::vector<RecvPart> in = on_host<RecvPart>(receives, transfer.received);
    copy_to_host(sends, out, device);
    const Ticket ticket = inner_->start(out, in, label);
    const std::lock_guard lock(mutex_);
    running_.insert_or_assign(ticket, std::move(transfer));
    return ticket;
  }

  void wait(Ticket ticket) override {
    auto entry = [&] {
      const std::lock_guard lock(mutex_);
      return running_.extract(ticket);
    }();
    inner_->wait(ticket);
    if (entry.empty()) return;
    Transfer& transfer = entry.mapped();
    const Stream stream = current_stream();
    for (const Buffer& buffer : transfer.received) {
      cuda_module().copy_pinned(buffer.device, buffer.host, buffer.bytes, stream.native());
    }
    const auto read = std::make_shared<Event>(transfer.device);
    read->record(stream);
    give_back(transfer, read);
  }

 private:
  struct Buffer {
    std::byte* host = nullptr;
    void* device = nullptr;
    std::size_t bytes = 0;
  };
  struct Transfer {
    Device device;
    std::vector<Buffer> sent, received;
  };

  std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const override {
    return std::make_unique<Staged>(std::move(part), staging_);
  }

  // The parts for other ranks, in pinned memory.
  template <class Part>
  std::vector<Part> on_host(std::span<const Part> parts, std::vector<Buffer>& buffers) {
    std::vector<Part> made;
    for (const Part& part : parts) {
      if (part.peer == rank() || part.bytes == 0) continue;
      buffers.push_back({staging_->pool.take(part.bytes), const_cast<void*>(static_cast<const void*>(part.data)), part.bytes});
      made.push_back({part.peer, buffers.back().host, part.bytes});
    }
    return made;
  }

  void copy_to_host(std::span<const SendPart> sends, const std::vector<SendPart>& out, Device device) {
    if (out.empty()) return;
    const Stream& stream = staging_->stream(device);
    const Event given(device), copied(device);
    given.record(current_stream());
    stream.wait(given);
    auto to = out.begin();
    for (const SendPart& part : sends) {
      if (part.peer == rank() || part.bytes == 0) continue;
      cuda_module().copy_pinned(const_cast<void*>((to++)->data), part.data, part.bytes, stream.native());
    }
    copied.record(stream);
    copied.synchronize();
  }

  void give_back(Transfer& transfer, const std::shared_ptr<Event>& read) {
    for (const Buffer& buffer : transfer.sent) staging_->pool.give(buffer.host, buffer.bytes, nullptr);
    for (const Buffer& buffer : transfer.received) staging_->pool.give(buffer.host, buffer.bytes, read);
  }

  std::shared_ptr<Staging> staging_;
  std::mutex mutex_;
  std::unordered_map<Ticket, Transfer> running_;
};

}  // namespace

std::unique_ptr<Communicator> staged(std::unique_ptr<Communicator> inner) {
  return std::make_unique<Staged>(std::move(inner), std::make_shared<Staging>());
}

}  // namespace dattn
