// Text as training data. A file is read as bytes; the bytes that occur in it are the alphabet (symbols 0 .. size - 1 in
// byte order), so any text in any encoding works and the vocabulary stays as small as the text allows.
// The last part of the file is held out. Batches are a pure function of (seed, step, row): the same on any mesh, and a
// resumed run needs no state of the data.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dattn {

class Alphabet {
 public:
  Alphabet() = default;
  static Alphabet of(std::string_view text);
  static Alphabet from_json(std::string_view json, const std::string& source);  // what to_json() wrote

  std::int64_t size() const { return static_cast<std::int64_t>(bytes_.size()); }
  std::vector<std::int32_t> encode(std::string_view text) const;  // throws Error(kBadInput) naming the first unknown byte
  std::string decode(std::span<const std::int32_t> symbols) const;
  char decode(std::int32_t symbol) const;  // throws Error(kBadInput) outside [0, size)
  std::string to_json() const;             // {"kind": "bytes", "bytes": [10, 32, ..]}
  bool operator==(const Alphabet&) const = default;

 private:
  friend class TextData;
  explicit Alphabet(const std::vector<unsigned char>& bytes);

  std::vector<unsigned char> bytes_;           // symbol -> byte, ascending
  std::array<std::int16_t, 256> symbol_of_{};  // byte -> symbol, -1 where it does not occur
};

struct TextOptions {
  double held_out = 0.1;     // share of the file at its end
  std::int64_t seq_len = 0;  // both parts must hold seq_len + 1 symbols
};

class TextData {
 public:
  // Throws Error(kBadInput) naming the path: missing, a folder, unreadable, empty, too short. A resumed run passes the alphabet
  // of its checkpoint, so that a text with other bytes is refused.
  static TextData load(const std::string& path, const TextOptions& options, const Alphabet* alphabet = nullptr);
  static TextData of(std::string_view text, const TextOptions& options, const std::string& source,
                     const Alphabet* alphabet = nullptr);

  const Alphabet& alphabet() const { return alphabet_; }
  std::span<const std::uint8_t> train() const { return std::span(symbols_).first(split_); }  // one symbol a byte
  std::span<const std::uint8_t> held_out() const { return std::span(symbols_).subspan(split_); }
  std::uint64_t checksum() const { return checksum_; }  // xxHash64 of the file

  // seq_len + 1 symbols: tokens are the first seq_len, targets the last. `row` counts the sequences of the step over the
  // whole job (0 .. batch - 1).
  std::vector<std::int32_t> train_window(std::uint64_t seed, std::int64_t step, std::int64_t row, std::int64_t seq_len) const;
  // The held-out text cut into windows whose targets follow each other without gap or overlap; the rest is dropped.
  std::int64_t held_out_windows(std::int64_t seq_len) const;
  std::vector<std::int32_t> held_out_window(std::int64_t index, std::int64_t seq_len) const;

 private:
  Alphabet alphabet_;
  std::vector<std::uint8_t> symbols_;
  std::size_t split_ = 0;
  std::uint64_t checksum_ = 0;
};

}  // namespace dattn
