// Errors: one exception type for the whole library. A message says what, both values, the remedy, and,
// through the thread's context ("rank 3/8"), who says it. Libraries throw; only the command and the C boundary catch.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace dattn {

// What went wrong, as the process exit code that stands for it.
enum class ErrorCode {
  kInternal = 1,  // a defect of this library
  kBadInput = 2,  // the caller's config, file, shape or option; nothing was changed
  kPeer = 3,      // another rank failed, vanished or did not answer within the deadline
  kDiverged = 4,  // training produced a value that is not finite
  kSystem = 5,    // the operating system refused: disk full, no permission, out of memory
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message);
  ErrorCode code() const { return code_; }
  int exit_code() const { return static_cast<int>(code_); }

 private:
  ErrorCode code_;
};

// A device's memory is used up. Whoever knows what it was for says so in a message of its own, around this one.
class OutOfMemory final : public Error {
 public:
  explicit OutOfMemory(const std::string& message) : Error(ErrorCode::kSystem, message), message_(message) {}
  const std::string& message() const { return message_; }  // without the context

 private:
  std::string message_;
};

// Appended to every message raised on this thread, for example "rank 3/8". Empty by default.
void set_error_context(std::string context);
const std::string& error_context();

template <class... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

// Refuses bad input: throws Error(kBadInput) with the formatted message unless `ok`.
template <class... Args>
void require(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) fail(ErrorCode::kBadInput, format, std::forward<Args>(args)...);
}

// States an invariant of our own code: throws Error(kInternal) unless `ok`.
template <class... Args>
void ensure(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) fail(ErrorCode::kInternal, format, std::forward<Args>(args)...);
}

}  // namespace dattn
