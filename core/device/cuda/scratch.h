// Memory of a device for the length of one operation, given out and taken back in the order of its stream.
#pragma once

#include <cstddef>

#include "core/device/cuda/runtime.h"

namespace dattn::cuda {

class Scratch {
 public:
  Scratch(std::size_t bytes, NativeStream stream) : memory_(allocate(bytes, stream)), stream_(stream) {}
  ~Scratch() { release(memory_, stream_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* ptr() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  NativeStream stream_;
};

}  // namespace dattn::cuda
