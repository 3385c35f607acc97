#include "plugins/train/metrics.h"

#include <cerrno>
#include <cstring>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/file.h"

namespace dattn {
namespace {

// The whole lines of a log whose step is not beyond `step`.
std::string kept_lines(const std::string& text, std::int64_t step) {
  std::string kept;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    if (end == text.npos) break;  // cut off while it was written
    const auto line = std::string_view(text).substr(begin, end + 1 - begin);
    const auto json = nlohmann::json::parse(line, nullptr, false);
    const bool later = json.is_object() && json.contains("step") && json["step"].is_number_integer() &&
                       json["step"].get<std::int64_t>() > step;
    if (json.is_object() && !later) kept += line;
    begin = end + 1;
  }
  return kept;
}

}  // namespace

MetricsLog::MetricsLog(const std::string& path, std::optional<std::int64_t> resume_step) : path_(path) {
  const bool keep = resume_step && std::filesystem::exists(path);
  write_file(path, keep ? kept_lines(read_file(path, "metrics"), *resume_step) : "");
  file_.reset(std::fopen(path.c_str(), "ae"));
  if (!file_) fail(ErrorCode::kSystem, "{}: cannot write: {}", path, std::strerror(errno));
}

void MetricsLog::append(std::string_view json_object) {
  ensure(json_object.find('\n') == json_object.npos, "a metrics line with a line break");
  const std::string line = std::string(json_object) + '\n';
  const bool ok = std::fwrite(line.data(), 1, line.size(), file_.get()) == line.size() && std::fflush(file_.get()) == 0;
  if (!ok) fail(ErrorCode::kSystem, "{}: cannot write: {}", path_, std::strerror(errno));
}

}  // namespace dattn
