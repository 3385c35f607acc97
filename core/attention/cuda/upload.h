// Arrays of the host that go to the device in one copy, through pinned memory, so that the host does not wait for the stream.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "core/device/cuda/scratch.h"

namespace dattn::cuda {

class Upload {
 public:
  // Where the array will be, as an argument of at(). It must live until send().
  template <class T>
  std::size_t add(std::span<const T> values) {
    const std::size_t offset = bytes_;
    parts_.push_back({values.data(), values.size_bytes(), offset});
    bytes_ = padded(offset + values.size_bytes());
    return offset;
  }
  // Room for an array that is written on the device.
  std::size_t add_room(std::size_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ = padded(offset + bytes);
    return offset;
  }

  // Starts the copy on the stream. The device's memory is given back, in the stream's order, with this object.
  void send(NativeStream stream);

  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(memory_->ptr<std::byte>() + offset);
  }

 private:
  struct Part {
    const void* data;
    std::size_t bytes, offset;
  };
  static std::size_t padded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

  std::vector<Part> parts_;
  std::size_t bytes_ = 0;
  std::optional<Scratch> memory_;
};

}  // namespace dattn::cuda
