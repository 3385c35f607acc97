// What a launch needs on a device and in the tests' stand-in alike (language.h, which they shadow).
#pragma once

#include <cuda_runtime.h>

namespace dattn::cuda {

// Throws Error(kSystem) naming call, error and the caller's place. In runtime.cpp: {fmt} does not compile under nvcc, so no
// error.h in .cu files.
void check(cudaError_t error, const char* call, const char* file = __builtin_FILE(), int line = __builtin_LINE());

// The blocks of a launch, and where it stands.
struct Grid {
  dim3 blocks;
  const char* file;
  int line;
  Grid(dim3 count, const char* in = __builtin_FILE(), int at = __builtin_LINE()) : blocks(count), file(in), line(at) {}
};

// Whether this thread is in a pass of host code that puts nothing on the stream (step.h): what would, does nothing.
bool only_host();

// Whether a launch of these blocks has anything to do.
inline bool starts(const Grid& grid) { return grid.blocks.x != 0 && grid.blocks.y != 0 && grid.blocks.z != 0 && !only_host(); }

}  // namespace dattn::cuda
