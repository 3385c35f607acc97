#include "core/base/library.h"

#include <dlfcn.h>
#include <link.h>

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

namespace {

// Every nvidia/PACKAGE/lib of the virtual environment's Python.
void add_python_packages(const std::filesystem::path& environment, const char* soname, std::vector<std::string>& paths) {
  std::error_code error;
  for (const auto& python : std::filesystem::directory_iterator(environment / "lib", error)) {
    const auto packages = python.path() / "site-packages" / "nvidia";
    for (const auto& package : std::filesystem::directory_iterator(packages, error)) {
      const auto file = package.path() / "lib" / soname;
      if (std::filesystem::exists(file, error)) paths.push_back(file.string());
    }
  }
}

std::vector<std::string> nvidia_candidates(const char* soname) {
  std::vector<std::string> paths{soname};
  if (const char* environment = std::getenv("VIRTUAL_ENV")) add_python_packages(environment, soname, paths);
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) add_python_packages(program.parent_path() / "../../venv", soname, paths);  // BUILD/release/bin beside BUILD/venv
  const char* toolkit = std::getenv("CUDA_HOME");
  for (const char* folder : {"lib64", "lib"}) {
    const auto file = std::filesystem::path(toolkit != nullptr ? toolkit : "/usr/local/cuda") / folder / soname;
    if (std::filesystem::exists(file, error)) paths.push_back(file.string());
  }
  return paths;
}

std::string path_of(void* handle, const std::string& asked) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map->l_name[0] != '\0' ? map->l_name : asked;
}

}  // namespace

Library open_nvidia_library(const char* variable, const char* soname) {
  const char* named = std::getenv(variable);
  if (named == nullptr) {
    if (void* loaded = dlopen(soname, RTLD_NOW | RTLD_NOLOAD)) return {loaded, path_of(loaded, soname), {}};
  }
  Library library;
  for (const std::string& path : named != nullptr ? std::vector<std::string>{named} : nvidia_candidates(soname)) {
    library.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library.handle != nullptr) return {library.handle, path_of(library.handle, path), {}};
    const char* why = dlerror();
    library.tried += (library.tried.empty() ? "" : "; ") + (why != nullptr ? std::string(why) : path);
  }
  library.tried +=
      std::string(named != nullptr ? "; named by " : "; set ") + variable + (named != nullptr ? "" : " to its path");
  return library;
}

}  // namespace dattn
