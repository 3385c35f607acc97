// TensorBoard event files: TFRecord frames (length, masked crc32c of the length, payload, masked crc32c of the payload)
// around Event protobufs, encoded by hand: scalar summaries are all that is needed here.
// Sources: tensorflow/core/util/event.proto, tensorflow/core/lib/io/record_writer (formats), RFC 3720 B.4 (crc32c).
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace dattn {

std::uint32_t crc32c(std::string_view bytes);

class TensorBoardWriter {
 public:
  // Opens a new event file in the folder, which is made. With `resume_step`, TensorBoard drops what older files of the
  // folder say about later steps. Throws Error(kSystem).
  explicit TensorBoardWriter(const std::string& folder, std::optional<std::int64_t> resume_step = {});

  void scalar(std::string_view tag, std::int64_t step, double value);  // flushed at once
  const std::string& path() const { return path_; }

 private:
  void record(const std::string& event);

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace dattn
