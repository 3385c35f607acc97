#include "plugins/c/boundary.h"

#include <new>

namespace dattn::c {
namespace {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

}  // namespace

CallScope::CallScope(const Context& context, std::string rank) : device_(context.device), rank_before_(error_context()) {
  set_error_context(std::move(rank));
  if (context.threads == 0) return;
  threads_before_ = num_threads();
  set_num_threads(context.threads);
}

CallScope::~CallScope() {
  if (threads_before_ > 0) set_num_threads(threads_before_);
  set_error_context(std::move(rank_before_));
}

dattn_status keep_failure() noexcept {
  try {
    try {
      throw;
    } catch (const Error& error) {
      last_error() = error.what();
      return static_cast<dattn_status>(error.exit_code());
    } catch (const std::bad_alloc&) {
      last_error() = "out of memory; use more ranks along the sequence, or a smaller batch";
      return DATTN_SYSTEM;
    } catch (const std::exception& error) {
      last_error() = error.what();
      return DATTN_INTERNAL;
    } catch (...) {
      last_error() = "an exception of unknown type";
      return DATTN_INTERNAL;
    }
  } catch (...) {  // no memory for the text
    last_error().clear();
    return DATTN_SYSTEM;
  }
}

}  // namespace dattn::c

int32_t dattn_version(void) { return DATTN_VERSION_MAJOR * 10000 + DATTN_VERSION_MINOR * 100 + DATTN_VERSION_PATCH; }

const char* dattn_last_error(void) { return dattn::c::last_error().c_str(); }
