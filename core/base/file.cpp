#include "core/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "core/base/error.h"

namespace dattn {
namespace {

[[noreturn]] void fail_system(std::string_view what, const std::string& path, int error) {
  const char* remedy = error == ENOSPC || error == EDQUOT ? "; free some space or choose another folder" : "";
  fail(ErrorCode::kSystem, "{}: cannot {}: {}{}", path, what, std::strerror(error), remedy);
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path), temporary_(path + ".tmp") {
  file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file_ < 0) fail_system("write", temporary_, errno);
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  ::close(file_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(file_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail_system("write", path_, written < 0 ? errno : ENOSPC);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(file_) != 0) fail_system("sync", path_, errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_system("rename the finished file to", path_, errno);
  ::close(file_);
  file_ = -1;
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  sync_folder(folder.empty() ? "." : folder);
}

void write_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void sync_folder(const std::string& path) {
  const int folder = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) fail_system("open the folder", path, errno);
  const int status = ::fsync(folder);
  const int error = errno;
  ::close(folder);
  // Some network file systems cannot sync folders and say so; there is nothing more that can be done there.
  if (status != 0 && error != EINVAL && error != ENOTSUP) fail_system("sync the folder", path, error);
}

std::string read_file(const std::string& path, std::string_view what, std::size_t limit) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  require(file >= 0, "{}: cannot read the {}: {}", path, what, std::strerror(errno));
  struct Close {
    int file;
    ~Close() { ::close(file); }
  } close_at_end{file};
  struct stat status {};
  require(::fstat(file, &status) == 0, "{}: cannot read the {}: {}", path, what, std::strerror(errno));
  require(!S_ISDIR(status.st_mode), "{}: the {} is a folder; name a file", path, what);
  require(S_ISREG(status.st_mode), "{}: the {} is no regular file", path, what);
  require(static_cast<std::size_t>(status.st_size) <= limit, "{}: the {} has {} bytes; at most {} are read", path, what,
          status.st_size, limit);
  std::string text(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t count = ::read(file, text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, "{}: cannot read the {}: {}", path, what, std::strerror(errno));
    if (count == 0) break;  // the file shrank meanwhile
    done += static_cast<std::size_t>(count);
  }
  text.resize(done);
  return text;
}

}  // namespace dattn
