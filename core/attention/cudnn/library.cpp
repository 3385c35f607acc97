#include "core/attention/cudnn/library.h"

#include <dlfcn.h>

#include <fmt/format.h>

#include "core/base/library.h"

namespace dattn::cudnn {
namespace {

constexpr const char* kVariable = "DATTN_CUDNN";
constexpr const char* kName = "libcudnn.so.9";

// Other libraries find what they share with these by name.
constexpr int kForAll = RTLD_NOW | RTLD_GLOBAL;

std::string why_missing(const Library& library) {
  const std::string wanted = fmt::format("cuDNN {} or later (pip install nvidia-cudnn-cu13)", version_text(kOldestVersion));
  return missing_text(library, kVariable, kName, wanted);
}

// The front end asks the process for CUDA's runtime by name, so one from the same folders is loaded where none is at hand.
void load_runtime() {
  for (const char* name : {"libcudart.so.13", "libcudart.so.12"}) {
    if (open_nvidia_library(nullptr, name, kForAll).handle != nullptr) return;
  }
}

CudnnLibrary load() {
  const Library opened = open_nvidia_library(kVariable, kName, kForAll);
  CudnnLibrary found{opened.handle, opened.path, 0, opened.handle != nullptr ? "" : why_missing(opened)};
  if (found.handle == nullptr) return found;
  auto* const version = reinterpret_cast<std::size_t (*)()>(dlsym(found.handle, "cudnnGetVersion"));
  if (version != nullptr) found.version = version();
  if (found.version < kOldestVersion) {
    found.why = version == nullptr ? found.path + " has no cudnnGetVersion"
                                   : fmt::format("{} has version {}; {} or later is needed", found.path,
                                                 version_text(found.version), version_text(kOldestVersion));
    found.handle = nullptr;
    return found;
  }
  load_runtime();
  return found;
}

}  // namespace

const CudnnLibrary& library() {
  static const CudnnLibrary found = load();
  return found;
}

std::string version_text(std::size_t version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace dattn::cudnn
