// Files whole or not at all: what is written goes to a temporary name, is synced and then renamed.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace dattn {

// A file under construction at "PATH.tmp". Destroyed before commit(), it removes that file.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);  // throws Error(kSystem) naming the path and the reason, like all of these
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  void commit();  // sync, rename, sync the folder

 private:
  std::string path_;
  std::string temporary_;
  int file_ = -1;
};

void write_file(const std::string& path, std::string_view text);  // through an AtomicFile
void sync_folder(const std::string& path);

// The bytes of a regular file. Throws Error(kBadInput): missing, a folder, unreadable, larger than `limit` bytes.
std::string read_file(const std::string& path, std::string_view what, std::size_t limit = SIZE_MAX);

}  // namespace dattn
