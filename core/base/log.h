// Log lines to stderr. `note_once` is for choices (kernel, strategy) that would otherwise repeat on every step.
// DATTN_LOG=quiet|info|debug picks the level (default info).
#pragma once

#include <string>
#include <utility>

#include <fmt/format.h>

namespace dattn {

enum class LogLevel { kQuiet, kInfo, kDebug };

LogLevel log_level();
void set_log_level(LogLevel level);

void log_line(LogLevel level, const std::string& text);                      // one line, with the thread's error context
void note_once(const std::string& text, LogLevel level = LogLevel::kDebug);  // at most once per process

template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  if (log_level() >= LogLevel::kInfo) log_line(LogLevel::kInfo, fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  if (log_level() >= LogLevel::kDebug) log_line(LogLevel::kDebug, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace dattn
