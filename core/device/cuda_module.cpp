#include "core/device/cuda_module.h"

#include <dlfcn.h>

#include "core/base/error.h"
#include "core/base/library.h"
#include "core/device/stream.h"
#include "core/device/tf32.h"

namespace dattn {
namespace {

constexpr const char* kModuleName = "libdattn_cuda.so";

struct Loaded {
  const CudaModule* module = nullptr;
  std::string why;
};

NativeStream stream_of_thread() { return current_stream().native(); }

Loaded load() {
  static const CudaHost host{&error_context, &stream_of_thread, &tf32_allowed};
  Loaded loaded;
  for (const std::string& path : library_candidates("DATTN_CUDA_MODULE", kModuleName)) {
    const LibraryEntry found = find_entry(path, "dattn_cuda_module", RTLD_NOW | RTLD_LOCAL);
    if (found.address != nullptr) {
      const CudaModule* module = reinterpret_cast<const CudaModule* (*)(const CudaHost*)>(found.address)(&host);
      if (module->version == kCudaModuleVersion) return {module, {}};
      loaded.why += fmt::format("; {} has version {}, not {}", path, module->version, kCudaModuleVersion);
    } else {
      loaded.why += "; " + found.why;
    }
  }
  loaded.why =
      fmt::format("the CUDA module {} cannot be loaded ({}); build with nvcc installed, or set DATTN_CUDA_MODULE to its path",
                  kModuleName, loaded.why.substr(2));
  return loaded;
}

const Loaded& loaded_once() {
  static const Loaded loaded = load();
  return loaded;
}

}  // namespace

const CudaModule* find_cuda_module(std::string& why) {
  why = loaded_once().why;
  return loaded_once().module;
}

const CudaModule& cuda_module() {
  const Loaded& loaded = loaded_once();
  if (loaded.module == nullptr) fail(ErrorCode::kSystem, "{}", loaded.why);
  return *loaded.module;
}

const std::vector<CudaDevice>& cuda_devices(std::string& why) {
  struct Found {
    std::vector<CudaDevice> devices;
    std::string why;
  };
  static const Found found = [] {
    Found made;
    const CudaModule* module = find_cuda_module(made.why);
    if (module != nullptr) made.devices = module->devices(made.why);
    return made;
  }();
  why = found.why;
  return found.devices;
}

}  // namespace dattn
