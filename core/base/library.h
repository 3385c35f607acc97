// Shared libraries that are loaded at run time, so that the program starts without them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dattn {

// Where a library of ours may be, in the order it is looked for: what the environment variable says and nothing else, or
// beside the file that holds this code and beside the program (../lib, lib, .), then the loader's own paths.
std::vector<std::string> library_candidates(const char* variable, const char* name);

// A function of the library at `path`, which stays loaded; or why there is none. flags: those of dlopen.
struct LibraryEntry {
  void* address = nullptr;
  std::string why;
};
LibraryEntry find_entry(const std::string& path, const char* function, int flags);

// Where a library of NVIDIA's with this soname may be, in the order it is looked for: what the environment variable (if any)
// says and nothing else, or what the process has loaded and the loader's paths, nvidia/*/lib of the Python packages
// (VIRTUAL_ENV, CONDA_PREFIX, build/venv, the python3 of PATH, ~/.local, the system's), the CUDA toolkits (CUDA_HOME,
// CUDA_PATH, /usr/local/cuda*).
std::vector<std::string> nvidia_library_paths(const char* variable, const char* soname);

// The first of them that can be loaded; it stays. flags: those of dlopen.
struct Library {
  void* handle = nullptr;
  std::string path;   // of the file
  std::string tried;  // why it is in none of these places, for messages
};
Library open_nvidia_library(const char* variable, const char* soname, int flags);
// Says of a library that was not opened where it was looked for and what to install, such as "cuDNN 9.19 or later (pip ..)".
std::string missing_text(const Library& library, const char* variable, const char* soname, std::string_view wanted);

}  // namespace dattn
