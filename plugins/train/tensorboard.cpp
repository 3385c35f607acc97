#include "plugins/train/tensorboard.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/base/host.h"

namespace dattn {
namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0x82f63b78u : 0u);  // Castagnoli, reflected
    table[i] = value;
  }
  return table;
}

// A checksum of data that holds checksums is weak; TFRecord therefore stores a rotated, shifted one.
std::uint32_t masked(std::uint32_t crc) { return std::rotr(crc, 15) + 0xa282ead8u; }

template <class T>
void put_little_endian(std::string& out, T value) {
  for (std::size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
}

// Protobuf wire format: a key is field number << 3 | wire type (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes).
void put_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7f) | 0x80);
  out += static_cast<char>(value);
}
void put_key(std::string& out, int field, int wire) { put_varint(out, static_cast<std::uint64_t>(field << 3 | wire)); }
void put_bytes(std::string& out, int field, std::string_view bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out += bytes;
}

// Event {1: double wall_time, 2: int64 step, 3: string file_version, 5: Summary, 7: SessionLog}
std::string make_event(std::int64_t step) {
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::string event;
  put_key(event, 1, 1);
  put_little_endian(event, std::bit_cast<std::uint64_t>(now));
  put_key(event, 2, 0);
  put_varint(event, static_cast<std::uint64_t>(step));
  return event;
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  static constexpr auto kTable = make_crc_table();
  std::uint32_t crc = ~0u;
  for (const char c : bytes) crc = kTable[(crc ^ static_cast<unsigned char>(c)) & 0xff] ^ (crc >> 8);
  return ~crc;
}

TensorBoardWriter::TensorBoardWriter(const std::string& folder, std::optional<std::int64_t> resume_step) {
  std::error_code ignored;
  std::filesystem::create_directories(folder, ignored);
  const auto seconds =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  path_ = fmt::format("{}/events.out.tfevents.{:010d}.{}.{}", folder, seconds, host_name(), getpid());
  file_.reset(std::fopen(path_.c_str(), "ae"));
  if (!file_) fail(ErrorCode::kSystem, "{}: cannot write: {}", path_, std::strerror(errno));
  std::string version = make_event(0);
  put_bytes(version, 3, "brain.Event:2");
  record(version);
  if (!resume_step) return;
  // SessionLog {1: status = START}: steps from this one on in older files were lost with the run that wrote them.
  std::string start = make_event(*resume_step + 1);
  put_bytes(start, 7, std::string("\x08\x01", 2));
  record(start);
}

void TensorBoardWriter::scalar(std::string_view tag, std::int64_t step, double value) {
  std::string entry;  // Summary.Value {1: string tag, 2: float simple_value}
  put_bytes(entry, 1, tag);
  put_key(entry, 2, 5);
  put_little_endian(entry, std::bit_cast<std::uint32_t>(static_cast<float>(value)));
  std::string summary;  // Summary {1: repeated Value}
  put_bytes(summary, 1, entry);
  std::string event = make_event(step);
  put_bytes(event, 5, summary);
  record(event);
}

void TensorBoardWriter::record(const std::string& event) {
  std::string frame;
  put_little_endian(frame, static_cast<std::uint64_t>(event.size()));
  put_little_endian(frame, masked(crc32c(frame)));
  frame += event;
  put_little_endian(frame, masked(crc32c(event)));
  const bool ok = std::fwrite(frame.data(), 1, frame.size(), file_.get()) == frame.size() && std::fflush(file_.get()) == 0;
  if (!ok) fail(ErrorCode::kSystem, "{}: cannot write: {}", path_, std::strerror(errno));
}

}  // namespace dattn
