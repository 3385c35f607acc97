// Safetensors files: an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
// tensors' bytes, row-major and little-endian. Format: the "Format" section of the safetensors project's README.
// The reader maps the file and checks everything before a tensor is handed out; the writer never leaves a half-written
// file under the final name.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor/tensor.h"

namespace dattn {

struct NamedTensor {
  std::string name;
  TensorView view;
};

// One tensor of a file, as its header states it. `dtype` is the format's word ("F32", "BF16", "I64", ..).
struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::size_t begin = 0;  // bytes from the start of the data
  std::size_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // by offset
  std::map<std::string, std::string> metadata;
  std::size_t data_begin = 0;  // bytes from the start of the file
};

// Checks a whole file held in memory: header length, JSON, names, types, shapes, offsets, holes, overlaps, overflow, truncation
// and trailing bytes. Throws Error(kBadInput) naming `source`, the tensor and both values.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source);

class SafetensorsFile {
 public:
  // Maps the file for reading. Throws Error(kBadInput) for a file that is missing, unreadable or malformed.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return header_.entries; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  bool has(std::string_view name) const { return find(name) != nullptr; }

  // The tensor on the mapped memory, valid as long as this object; writing to it does not reach the file. F32, BF16, F64 and
  // I32 of up to kMaxAxes axes; others are refused by name. Memory is aligned to the element only.
  TensorView view(std::string_view name) const;
  std::span<const std::byte> bytes() const;  // the whole file

 private:
  const SafetensorsEntry* find(std::string_view name) const;

  struct Mapping;
  std::unique_ptr<Mapping> mapping_;
  std::string path_;
  SafetensorsHeader header_;
};

// Writes tensors of any strides and devices, in the order given, to a temporary name beside `path`, syncs, renames. On failure
// (disk full: Error(kSystem)) the temporary file is removed and what stood under `path` stays. Returns the bytes written.
std::size_t write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                              const std::map<std::string, std::string>& metadata = {});

}  // namespace dattn
