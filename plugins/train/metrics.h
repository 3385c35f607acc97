// metrics.jsonl: one JSON object per line, flushed line by line, so that a killed run keeps what it reported.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace dattn {

class MetricsLog {
 public:
  // A fresh file, or, with `resume_step`, the old one without the lines whose "step" is greater (and without a last
  // line that was cut off). Throws Error(kSystem).
  explicit MetricsLog(const std::string& path, std::optional<std::int64_t> resume_step = {});

  void append(std::string_view json_object);  // one line; the caller's text must hold no line break
  const std::string& path() const { return path_; }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace dattn
