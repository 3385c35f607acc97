// What streams do with device memory.
#pragma once

#include <cstddef>

namespace dattn::cuda::standin {

constexpr unsigned char kFreed = 0xff;  // NaN as fp32, fp64 and bf16, like memory that nobody wrote yet

void release_device_memory(void* memory);
void free_of_graph(void* memory);  // memory that was allocated in a capture
void poison_freed(void* memory, std::size_t bytes);
void unpoison_freed(void* memory, std::size_t bytes);

}  // namespace dattn::cuda::standin
