// Shared libraries that are loaded at run time, so that the program starts without them.
#pragma once

#include <string>
#include <vector>

namespace dattn {

// Where a library of ours may be, in the order it is looked for: what the environment variable says and nothing else, or
// beside the program (../lib, lib, .), then the loader's own paths.
std::vector<std::string> library_candidates(const char* variable, const char* name);

// A function of the library at `path`, which stays loaded; or why there is none. flags: those of dlopen.
struct LibraryEntry {
  void* address = nullptr;
  std::string why;
};
LibraryEntry find_entry(const std::string& path, const char* function, int flags);

// A library of NVIDIA's, by its soname, loaded from the first place that has it: what the environment variable says and nothing
// else; the process, where it is loaded already; the loader's paths; nvidia/*/lib of the Python packages (VIRTUAL_ENV,
// build/venv); the CUDA toolkit (CUDA_HOME, /usr/local/cuda).
struct Library {
  void* handle = nullptr;
  std::string path;   // of the file
  std::string tried;  // where it is not, and why, for messages
};
Library open_nvidia_library(const char* variable, const char* soname);

}  // namespace dattn
