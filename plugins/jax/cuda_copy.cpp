#include "plugins/jax/cuda_copy.h"

#include <dlfcn.h>

#include <cstdint>

namespace dattn::jax {
namespace {

// cuda.h's cuMemcpyDtoHAsync and cuStreamSynchronize; CUresult 0 is success.
struct Driver {
  int (*copy)(void* host, std::uintptr_t device, std::size_t bytes, void* stream) = nullptr;
  int (*synchronize)(void* stream) = nullptr;

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (library == nullptr) return;
    copy = reinterpret_cast<decltype(copy)>(dlsym(library, "cuMemcpyDtoHAsync_v2"));
    synchronize = reinterpret_cast<decltype(synchronize)>(dlsym(library, "cuStreamSynchronize"));
  }
};

}  // namespace

std::string copy_from_device(void* to, const void* from, std::size_t bytes, void* stream) {
  static const Driver driver;
  if (driver.copy == nullptr || driver.synchronize == nullptr) return "libcuda.so.1 cannot be loaded";
  int result = driver.copy(to, reinterpret_cast<std::uintptr_t>(from), bytes, stream);
  if (result == 0) result = driver.synchronize(stream);
  return result == 0 ? "" : "copying from the device failed with CUresult " + std::to_string(result);
}

}  // namespace dattn::jax
