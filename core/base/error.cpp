#include "core/base/error.h"

namespace dattn {
namespace {
thread_local std::string t_context;

std::string with_context(const std::string& message) { return t_context.empty() ? message : message + " [" + t_context + "]"; }
}  // namespace

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(with_context(message)), code_(code) {}

void set_error_context(std::string context) { t_context = std::move(context); }
const std::string& error_context() { return t_context; }

}  // namespace dattn
