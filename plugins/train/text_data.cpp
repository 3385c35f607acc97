#include "plugins/train/text_data.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/philox.h"

namespace dattn {
namespace {

constexpr std::size_t kMaxTextBytes = std::size_t{1} << 36;
constexpr std::uint32_t kDataStream = 0x64617461;  // "data": keeps these draws apart from weights and dropout

std::string describe_byte(unsigned char byte) {
  return byte >= 0x21 && byte < 0x7f ? fmt::format("'{}'", static_cast<char>(byte)) : fmt::format("byte 0x{:02x}", byte);
}

}  // namespace

Alphabet::Alphabet(const std::vector<unsigned char>& bytes) : bytes_(bytes) {
  symbol_of_.fill(-1);
  for (std::size_t symbol = 0; symbol < bytes_.size(); ++symbol) symbol_of_[bytes_[symbol]] = static_cast<std::int16_t>(symbol);
}

Alphabet Alphabet::of(std::string_view text) {
  std::array<bool, 256> seen{};
  for (const char c : text) seen[static_cast<unsigned char>(c)] = true;
  std::vector<unsigned char> bytes;
  for (std::size_t byte = 0; byte < seen.size(); ++byte) {
    if (seen[byte]) bytes.push_back(static_cast<unsigned char>(byte));
  }
  return Alphabet(bytes);
}

Alphabet Alphabet::from_json(std::string_view json, const std::string& source) {
  const auto parsed = nlohmann::json::parse(json, nullptr, false);
  require(parsed.is_object() && parsed.contains("bytes") && parsed["bytes"].is_array(), "{}: the alphabet is damaged", source);
  std::vector<unsigned char> bytes;
  for (const auto& byte : parsed["bytes"]) {
    const bool ok = byte.is_number_unsigned() && byte.get<std::uint64_t>() < 256;
    require(ok && (bytes.empty() || byte.get<int>() > bytes.back()), "{}: the alphabet is damaged: {} after {} bytes", source,
            byte.dump(), bytes.size());
    bytes.push_back(byte.get<unsigned char>());
  }
  return Alphabet(bytes);
}

std::vector<std::int32_t> Alphabet::encode(std::string_view text) const {
  std::vector<std::int32_t> symbols(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    symbols[i] = bytes_.empty() ? -1 : symbol_of_[byte];
    require(symbols[i] >= 0,
            "{} at position {} of the text is not among the {} characters that the model was trained on; leave it out",
            describe_byte(byte), i, size());
  }
  return symbols;
}

char Alphabet::decode(std::int32_t symbol) const {
  require(symbol >= 0 && symbol < size(), "symbol {} is outside the alphabet of {}", symbol, size());
  return static_cast<char>(bytes_[static_cast<std::size_t>(symbol)]);
}

std::string Alphabet::decode(std::span<const std::int32_t> symbols) const {
  std::string text;
  text.reserve(symbols.size());
  for (const std::int32_t symbol : symbols) text += decode(symbol);
  return text;
}

std::string Alphabet::to_json() const {
  return nlohmann::json{{"kind", "bytes"}, {"bytes", std::vector<int>(bytes_.begin(), bytes_.end())}}.dump();
}

TextData TextData::load(const std::string& path, const TextOptions& options, const Alphabet* alphabet) {
  require(!path.empty(), "data.path is not set; name a text file, such as --set data.path=my.txt");
  return of(read_file(path, "training text", kMaxTextBytes), options, path, alphabet);
}

TextData TextData::of(std::string_view text, const TextOptions& options, const std::string& source, const Alphabet* alphabet) {
  require(!text.empty(), "{}: the training text is empty", source);
  require(options.held_out >= 0 && options.held_out < 1, "held-out share {} must lie in [0, 1)", options.held_out);
  TextData data;
  data.alphabet_ = alphabet != nullptr ? *alphabet : Alphabet::of(text);
  const auto held_out = static_cast<std::size_t>(static_cast<double>(text.size()) * options.held_out);
  data.split_ = text.size() - held_out;
  const auto need = static_cast<std::size_t>(options.seq_len) + 1;
  require(data.split_ >= need,
          "{}: {} characters to train on, but train.seq_len {} needs {}; use a longer text or a shorter seq_len", source,
          data.split_, options.seq_len, need);
  require(held_out == 0 || held_out >= need,
          "{}: {} characters held out, but train.seq_len {} needs {}; use a longer text, a shorter seq_len or a larger "
          "data.held_out",
          source, held_out, options.seq_len, need);
  data.symbols_.resize(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const std::int16_t symbol = data.alphabet_.symbol_of_[byte];
    require(symbol >= 0,
            "{}: {} at position {} is not in the checkpoint's alphabet of {}; resume with the text it was trained on", source,
            describe_byte(byte), i, data.alphabet_.size());
    data.symbols_[i] = static_cast<std::uint8_t>(symbol);
  }
  data.checksum_ = XXH64(text.data(), text.size(), 0);
  return data;
}

std::vector<std::int32_t> TextData::train_window(std::uint64_t seed, std::int64_t step, std::int64_t row,
                                                 std::int64_t seq_len) const {
  const std::size_t length = static_cast<std::size_t>(seq_len) + 1;
  require(seq_len >= 1 && length <= split_, "a window of {} symbols does not fit in {}", length, split_);
  const PhiloxBlock words = philox4x32(seed, {static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32),
                                              static_cast<std::uint32_t>(row), kDataStream});
  // 64 random bits times the number of starts, upper half: uniform to one part in 2^64 / starts.
  const std::uint64_t random = std::uint64_t{words[1]} << 32 | words[0];
  const std::uint64_t starts = split_ - length + 1;
  const auto start = static_cast<std::size_t>(static_cast<unsigned __int128>(random) * starts >> 64);
  const auto window = train().subspan(start, length);
  return {window.begin(), window.end()};
}

std::int64_t TextData::held_out_windows(std::int64_t seq_len) const {
  const auto count = static_cast<std::int64_t>(symbols_.size() - split_);
  return seq_len >= 1 && count > 0 ? (count - 1) / seq_len : 0;
}

std::vector<std::int32_t> TextData::held_out_window(std::int64_t index, std::int64_t seq_len) const {
  require(index >= 0 && index < held_out_windows(seq_len), "held-out window {} of {}", index, held_out_windows(seq_len));
  const auto window = held_out().subspan(static_cast<std::size_t>(index * seq_len), static_cast<std::size_t>(seq_len) + 1);
  return {window.begin(), window.end()};
}

}  // namespace dattn
