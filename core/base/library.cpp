#include "core/base/library.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string_view>

#include <fmt/format.h>

namespace dattn {
namespace {

namespace fs = std::filesystem;

// The program's own folder; empty where the system does not tell.
fs::path program_folder() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error).parent_path();
}

// The folder of the file that holds this code: the program, or libdattn.so inside some other program.
fs::path own_folder() {
  Dl_info info{};
  std::error_code error;
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return {};
  return fs::canonical(info.dli_fname, error).parent_path();
}

// Folders `parent`/NAME whose name starts with `prefix`, the highest name first.
std::vector<fs::path> folders_in(const fs::path& parent, std::string_view prefix) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator i(parent, error), end; !error && i != end; i.increment(error)) {
    if (i->path().filename().string().starts_with(prefix)) found.push_back(i->path());
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

// The folder above the one of PATH that has python3, or nothing.
fs::path python_of_path() {
  const char* path = std::getenv("PATH");
  std::string_view rest = path != nullptr ? path : "";
  while (!rest.empty()) {
    const fs::path folder(rest.substr(0, rest.find(':')));
    std::error_code error;
    if (fs::exists(folder / "python3", error)) return folder.parent_path();
    rest.remove_prefix(std::min(rest.size(), folder.native().size() + 1));
  }
  return {};
}

// Roots of Python installations, the active environment's first.
std::vector<fs::path> python_roots() {
  std::vector<fs::path> roots;
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* root = std::getenv(variable)) roots.emplace_back(root);
  }
  if (const fs::path program = program_folder(); !program.empty()) {
    roots.push_back(program / "../../venv");  // BUILD/venv beside BUILD/release/bin
  }
  if (const fs::path own = own_folder(); !own.empty()) {
    roots.push_back(own / "../../../..");  // lib/python3.x/site-packages/dattn/libdattn.so
  }
  if (fs::path root = python_of_path(); !root.empty()) roots.push_back(std::move(root));
  if (const char* home = std::getenv("HOME")) roots.push_back(fs::path(home) / ".local");
  roots.insert(roots.end(), {"/usr/local", "/usr"});
  return roots;
}

std::vector<fs::path> toolkits() {
  std::vector<fs::path> roots;
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* root = std::getenv(variable)) roots.emplace_back(root);
  }
  for (fs::path& root : folders_in("/usr/local", "cuda")) roots.push_back(std::move(root));
  return roots;
}

std::string path_of(void* handle, const std::string& asked) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map->l_name[0] != '\0' ? map->l_name : asked;
}

}  // namespace

std::vector<std::string> library_candidates(const char* variable, const char* name) {
  if (const char* named = std::getenv(variable)) return {named};
  std::vector<std::string> paths;
  for (const fs::path& folder : {own_folder(), program_folder()}) {
    for (const char* place : {"../lib", "lib", "."}) {
      std::error_code error;
      const std::string path = (folder / place / name).lexically_normal().string();
      if (folder.empty() || !fs::exists(path, error)) continue;
      if (std::find(paths.begin(), paths.end(), path) == paths.end()) paths.push_back(path);
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

std::vector<std::string> nvidia_library_paths(const char* variable, const char* soname) {
  if (const char* named = variable != nullptr ? std::getenv(variable) : nullptr) return {named};
  std::vector<std::string> paths{soname};
  const auto add = [&](const fs::path& file) {
    std::error_code error;
    if (fs::exists(file, error) && std::find(paths.begin(), paths.end(), file.string()) == paths.end()) paths.push_back(file);
  };
  for (const fs::path& root : python_roots()) {
    for (const fs::path& python : folders_in(root / "lib", "python3")) {
      for (const char* packages : {"site-packages", "dist-packages"}) {
        for (const fs::path& package : folders_in(python / packages / "nvidia", "")) add(package / "lib" / soname);
      }
    }
  }
  for (const fs::path& root : toolkits()) {
    for (const char* place : {"lib64", "lib"}) add(root / place / soname);
  }
  return paths;
}

Library open_nvidia_library(const char* variable, const char* soname, int flags) {
  Library library;
  for (const std::string& path : nvidia_library_paths(variable, soname)) {
    library.handle = dlopen(path.c_str(), flags);
    if (library.handle != nullptr) return {library.handle, path_of(library.handle, path), {}};
    const char* why = dlerror();
    library.tried += (library.tried.empty() ? "" : "; ") + (why != nullptr ? std::string(why) : path);
  }
  return library;
}

std::string missing_text(const Library& library, const char* variable, const char* soname, std::string_view wanted) {
  if (const char* named = std::getenv(variable))
    return fmt::format("{}={} cannot be loaded: {}", variable, named, library.tried);
  return fmt::format(
      "{} is neither on the loader's paths nor in site-packages/nvidia nor in the CUDA toolkit; install {}, or set {} to its "
      "path",
      soname, wanted, variable);
}

}  // namespace dattn
