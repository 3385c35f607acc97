// Any bytes as a safetensors file: refused with an Error, or every tensor lies inside the file and none overlap.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "core/base/error.h"
#include "core/tensor/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace dattn;
  try {
    const SafetensorsHeader header = parse_safetensors(std::as_bytes(std::span(data, size)), "fuzz.safetensors");
    std::size_t reached = 0;
    for (const SafetensorsEntry& entry : header.entries) {
      if (entry.begin != reached || entry.end < entry.begin || header.data_begin + entry.end > size) std::abort();
      reached = entry.end;
    }
    if (header.data_begin + reached != size) std::abort();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kBadInput) std::abort();
  }
  return 0;
}
