// The cuDNN library, loaded at run time from where NVIDIA's libraries are (core/base/library.h); DATTN_CUDNN=path names one.
#pragma once

#include <string>
#include <vector>

namespace dattn::cudnn {

inline constexpr std::size_t kOldestVersion = 91900;  // what the support table was made with: 9.19.0

struct CudnnLibrary {
  void* handle = nullptr;
  std::string path;
  std::size_t version = 0;  // 91900 is 9.19.0
  std::string why;          // where there is none: what was tried
};

const CudnnLibrary& library();  // loaded at the first call, for good

std::string version_text(std::size_t version);

}  // namespace dattn::cudnn
