#include "core/base/log.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string_view>

#include "core/base/error.h"

namespace dattn {
namespace {

LogLevel level_from_environment() {
  const char* value = std::getenv("DATTN_LOG");
  const std::string_view word = value ? value : "info";
  if (word == "quiet") return LogLevel::kQuiet;
  return word == "debug" ? LogLevel::kDebug : LogLevel::kInfo;
}

std::atomic<LogLevel>& level() {
  static std::atomic<LogLevel> value{level_from_environment()};
  return value;
}

}  // namespace

LogLevel log_level() { return level().load(std::memory_order_relaxed); }
void set_log_level(LogLevel value) { level() = value; }

void log_line(LogLevel line_level, const std::string& text) {
  if (line_level > log_level()) return;
  const std::string& context = error_context();
  const std::string line = "dattn: " + (context.empty() ? text : text + " [" + context + "]") + "\n";
  // One write per line, so that lines of several ranks do not mix.
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line.data(), line.size());
}

void note_once(const std::string& text, LogLevel level) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  {
    const std::lock_guard lock(mutex);
    if (!seen.insert(text).second) return;
  }
  log_line(level, text);
}

}  // namespace dattn
