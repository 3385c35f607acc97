// What a stream is given while it is captured.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "cuda_runtime.h"

namespace dattn::cuda::standin {

struct Capture {
  struct Block {
    void* memory;
    std::size_t bytes;
    bool freed = false;
  };
  std::vector<std::function<void()>> work;
  std::vector<Block> blocks;  // allocated meanwhile; they live as long as the graph

  Capture() = default;
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture();
  bool free(void* memory);  // false: it was not allocated in this capture
};

// What cannot be captured: an error that says so, or cudaSuccess where the stream is not captured.
cudaError_t refuse_in_capture(const CUstream_st& stream, const char* what);

}  // namespace dattn::cuda::standin
