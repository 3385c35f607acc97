// The C boundary: no exception leaves it, every failure becomes a status and this thread's message. What a handle stands for is
// held by shared pointers, so that handles may be destroyed in any order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "core/device/device.h"
#include "plugins/c/dattn.h"

namespace dattn::c {

struct Context {
  Device device;
  int threads = 0;  // 0: the calling thread's
};

// What holds for one call into the library: the context's device and threads, the rank in messages; all put back at the end.
class CallScope {
 public:
  CallScope(const Context& context, std::string rank);
  ~CallScope();
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  DeviceScope device_;
  std::string rank_before_;
  int threads_before_ = 0;  // 0: unchanged
};

// Keeps the exception being handled as this thread's message; its status.
dattn_status keep_failure() noexcept;

template <class Body>
dattn_status guarded(const Body& body) noexcept {
  try {
    body();
    return DATTN_OK;
  } catch (...) {
    return keep_failure();
  }
}

// A struct of the caller's, of this header's size: what an older caller's lacks is 0; what a newer one's has beyond is refused
// unless it is 0.
template <class Struct>
Struct read_struct(const Struct* given, std::string_view name) {
  require(given != nullptr, "{} is NULL", name);
  require(given->struct_size >= sizeof(std::size_t), "{}.struct_size is {}; set it to sizeof({})", name, given->struct_size,
          name);
  Struct read{};
  std::memcpy(&read, given, std::min(given->struct_size, sizeof(Struct)));
  const char* bytes = reinterpret_cast<const char*>(given);
  for (std::size_t i = sizeof(Struct); i < given->struct_size; ++i) {
    require(bytes[i] == 0, "{} of {} bytes has members that this library ({} bytes) does not know; use a newer library", name,
            given->struct_size, sizeof(Struct));
  }
  read.struct_size = sizeof(Struct);
  return read;
}

template <class Struct>
Struct read_optional(const Struct* given, std::string_view name) {
  return given == nullptr ? Struct{} : read_struct(given, name);
}

template <class Struct>
void write_struct(const Struct& from, Struct* to, std::string_view name) {
  require(to != nullptr, "{} is NULL", name);
  require(to->struct_size >= sizeof(std::size_t), "{}.struct_size is {}; set it to sizeof({})", name, to->struct_size, name);
  const std::size_t size = to->struct_size;
  std::memcpy(to, &from, std::min(size, sizeof(Struct)));
  to->struct_size = size;
}

template <class Pointer>
void require_pointer(const Pointer* pointer, std::string_view name) {
  require(pointer != nullptr, "{} is NULL", name);
}

}  // namespace dattn::c
