#include "core/base/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

namespace dattn {

std::vector<std::string> library_candidates(const char* variable, const char* name) {
  if (const char* named = std::getenv(variable)) return {named};
  std::vector<std::string> paths;
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    for (const char* place : {"../lib", "lib", "."}) {
      const auto path = program.parent_path() / place / name;
      if (std::filesystem::exists(path, error)) paths.push_back(path.lexically_normal().string());
    }
  }
  paths.emplace_back(name);
  return paths;
}

LibraryEntry find_entry(const std::string& path, const char* function, int flags) {
  void* library = dlopen(path.c_str(), flags);
  if (library == nullptr) {
    const char* why = dlerror();
    return {nullptr, why != nullptr ? why : path};
  }
  void* address = dlsym(library, function);
  return {address, address != nullptr ? "" : path + " has no " + function};
}

}  // namespace dattn
