#include "core/attention/cudnn/library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include <fmt/format.h>

namespace dattn::cudnn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kName = "libcudnn.so.9";

// The folders inside `folder` whose names start with `prefix`, ascending.
std::vector<fs::path> folders_in(const fs::path& folder, const std::string& prefix) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator i(folder, error), end; !error && i != end; i.increment(error)) {
    if (i->path().filename().string().rfind(prefix, 0) == 0) found.push_back(i->path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Where the packages of PyPI and the toolkit put NVIDIA's libraries.
std::vector<fs::path> library_folders() {
  std::vector<fs::path> folders, prefixes;
  if (const char* venv = std::getenv("VIRTUAL_ENV")) prefixes.emplace_back(fs::path(venv) / "lib");
  if (const char* home = std::getenv("HOME")) prefixes.emplace_back(fs::path(home) / ".local/lib");
  prefixes.insert(prefixes.end(), {"/usr/local/lib", "/usr/lib"});
  for (const fs::path& prefix : prefixes) {
    for (const fs::path& python : folders_in(prefix, "python3")) {
      for (const char* packages : {"site-packages", "dist-packages"}) {
        for (const fs::path& package : folders_in(python / packages / "nvidia", "")) folders.push_back(package / "lib");
      }
    }
  }
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* toolkit = std::getenv(variable)) folders.emplace_back(fs::path(toolkit) / "lib64");
  }
  folders.emplace_back("/usr/local/cuda/lib64");
  return folders;
}

void* open_in_folders(const char* name, std::string& path) {
  std::error_code error;
  for (const fs::path& folder : library_folders()) {
    if (!fs::exists(folder / name, error)) continue;
    if (void* handle = dlopen((folder / name).c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      path = (folder / name).string();
      return handle;
    }
  }
  return nullptr;
}

void* open_by_order(std::string& path, std::string& why) {
  if (const char* named = std::getenv("DATTN_CUDNN")) {
    path = named;
    void* handle = dlopen(named, RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) why = fmt::format("DATTN_CUDNN={} cannot be loaded: {}", named, dlerror());
    return handle;
  }
  path = kName;
  if (void* loaded = dlopen(kName, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD)) return loaded;
  if (void* handle = dlopen(kName, RTLD_NOW | RTLD_GLOBAL)) return handle;
  if (void* handle = open_in_folders(kName, path)) return handle;
  why = fmt::format(
      "{} is neither on the loader's paths nor in site-packages/nvidia nor in the CUDA toolkit; install cuDNN {} or "
      "later (pip install nvidia-cudnn-cu13), or set DATTN_CUDNN to its path",
      kName, version_text(kOldestVersion));
  return nullptr;
}

// The front end asks the process for CUDA's runtime by name, so one from the same folders is loaded where none is at hand.
void load_runtime() {
  std::string path;
  for (const char* name : {"libcudart.so.13", "libcudart.so.12"}) {
    if (dlopen(name, RTLD_NOW) != nullptr || open_in_folders(name, path) != nullptr) return;
  }
}

CudnnLibrary load() {
  CudnnLibrary found;
  found.handle = open_by_order(found.path, found.why);
  if (found.handle == nullptr) return found;
  Dl_info info{};
  auto* const version = reinterpret_cast<std::size_t (*)()>(dlsym(found.handle, "cudnnGetVersion"));
  if (version != nullptr) {
    found.version = version();
    if (dladdr(reinterpret_cast<const void*>(version), &info) != 0) found.path = info.dli_fname;
  }
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
