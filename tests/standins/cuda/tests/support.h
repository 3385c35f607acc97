// Memory of the device that tests read and write between launches.
#pragma once

#include <cstddef>
#include <vector>

#include "core/device/cuda/language.h"

namespace dattn::cuda {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;  // ends the program at what a test would see reported
#else
inline constexpr bool kAddressSanitizer = false;
#endif

template <class T>
class Array {
 public:
  explicit Array(std::size_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpyAsync(data_, values.data(), values.size() * sizeof(T), cudaMemcpyDefault, nullptr), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> all(count_);
    check(cudaMemcpyAsync(all.data(), data_, count_ * sizeof(T), cudaMemcpyDefault, nullptr), "cudaMemcpyAsync");
    return all;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

}  // namespace dattn::cuda
