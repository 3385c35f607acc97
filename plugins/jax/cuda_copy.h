// A few bytes from a CUDA device, through the driver that the host program has loaded.
#pragma once

#include <cstddef>
#include <string>

namespace dattn::jax {

// Copies in the order of `stream`, waits, and returns what went wrong, or "".
std::string copy_from_device(void* to, const void* from, std::size_t bytes, void* stream);

}  // namespace dattn::jax
