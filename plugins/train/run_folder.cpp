#include "plugins/train/run_folder.h"

#include <filesystem>

#include "core/base/error.h"

namespace dattn {
namespace fs = std::filesystem;
namespace {

bool looks_like_run(const fs::path& path) {
  return fs::exists(path / "config.yaml") || fs::exists(path / "metrics.jsonl") || fs::is_directory(path / "checkpoints");
}

std::string without_trailing_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

}  // namespace

RunFolder fresh_run_folder(const std::string& requested) {
  require(!requested.empty(), "the run folder has no name; set train.out");
  RunFolder folder{without_trailing_slash(requested), ""};
  try {
    const fs::path path = folder.path;
    require(!fs::exists(path) || fs::is_directory(path), "{}: a file stands where the run folder should go; set train.out",
            folder.path);
    if (fs::exists(path) && !fs::is_empty(path)) {
      require(looks_like_run(path), "{}: the folder holds something that is no run; choose another train.out", folder.path);
      int number = 1;
      do {
        folder.set_aside = folder.path + "." + std::to_string(number++);
      } while (fs::exists(folder.set_aside));
      fs::rename(path, folder.set_aside);
    }
    fs::create_directories(folder.checkpoints());
  } catch (const fs::filesystem_error& error) {
    fail(ErrorCode::kSystem, "{}: cannot make the run folder: {}", folder.path, error.code().message());
  }
  return folder;
}

RunFolder existing_run_folder(const std::string& requested) {
  RunFolder folder{without_trailing_slash(requested), ""};
  std::error_code ignored;
  require(fs::is_directory(folder.path, ignored), "{}: no such run folder", folder.path);
  require(looks_like_run(folder.path), "{}: no run folder: it has no config.yaml, metrics.jsonl or checkpoints/", folder.path);
  return folder;
}

}  // namespace dattn
