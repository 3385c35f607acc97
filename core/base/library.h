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

}  // namespace dattn
