// Functions of the CUDA runtime, or of its stand-in, for stand-ins of other libraries.
#pragma once

#include <dlfcn.h>
#include <link.h>

namespace standin {

// nullptr where there is none. The module that has one is loaded out of sight of the global scope: all loaded libraries are
// asked.
inline void* cuda_function(const char* name) {
  struct Search {
    const char* name;
    void* found;
  } search{name, dlsym(RTLD_DEFAULT, name)};
  const auto ask = [](dl_phdr_info* info, std::size_t, void* data) {
    auto& wanted = *static_cast<Search*>(data);
    void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    wanted.found = dlsym(library, wanted.name);
    dlclose(library);
    return wanted.found != nullptr ? 1 : 0;
  };
  if (search.found == nullptr) dl_iterate_phdr(ask, &search);
  return search.found;
}

// cudaLaunchHostFunc, or nullptr.
using HostFunction = void (*)(void*);
using LaunchHostFunction = int (*)(void* stream, HostFunction function, void* data);
inline LaunchHostFunction launch_host_function() {
  static const auto found = reinterpret_cast<LaunchHostFunction>(cuda_function("cudaLaunchHostFunc"));
  return found;
}

}  // namespace standin
