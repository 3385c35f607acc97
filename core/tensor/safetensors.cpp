#include "core/tensor/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <set>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/file.h"

namespace dattn {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxHeaderBytes = 100'000'000;  // as in the safetensors project's own reader
constexpr std::size_t kAlign = 64;                    // our files start their data at a cache line

struct ElementType {
  std::string_view word;
  std::size_t bytes;
  std::optional<DType> dtype;
};
constexpr ElementType kTypes[] = {{"F32", 4, DType::kF32}, {"BF16", 2, DType::kBF16},
                                  {"F64", 8, DType::kF64}, {"I32", 4, DType::kI32},
                                  {"F16", 2, DType::kF16}, {"I64", 8, {}},
                                  {"U64", 8, {}},          {"U32", 4, {}},
                                  {"I16", 2, {}},          {"U16", 2, {}},
                                  {"I8", 1, {}},           {"U8", 1, {}},
                                  {"BOOL", 1, {}},         {"F8_E4M3", 1, {}},
                                  {"F8_E5M2", 1, {}}};

const ElementType* find_type(std::string_view word) {
  const auto* found = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const ElementType& t) { return t.word == word; });
  return found == std::end(kTypes) ? nullptr : found;
}

std::string_view word_of(DType dtype) {
  for (const ElementType& type : kTypes) {
    if (type.dtype == dtype) return type.word;
  }
  fail(ErrorCode::kInternal, "safetensors has no word for {}", name_of(dtype));
}

// nlohmann's parser keeps the last of two equal keys and recurses over arrays; this handler of its events refuses the
// former and bounds the latter, since a header needs three levels only.
class HeaderGuard final : public nlohmann::json_sax<Json> {
 public:
  std::string problem;

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return open(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem = fmt::format("the key '{}' twice", name);
    return false;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    problem = error.what();
    return false;
  }

 private:
  bool open() {
    keys_.emplace_back();
    if (keys_.size() > 3) problem = "nested deeper than 3 levels";
    return problem.empty();
  }
  bool close() {
    keys_.pop_back();
    return true;
  }
  std::vector<std::set<std::string>> keys_;
};

std::size_t read_length(std::span<const std::byte> file, const std::string& source) {
  require(file.size() >= 8, "{}: {} bytes; a safetensors file has at least 8", source, file.size());
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < 8; ++i) length |= std::uint64_t{std::to_integer<std::uint8_t>(file[i])} << (8 * i);
  require(length <= kMaxHeaderBytes, "{}: a header of {} bytes; at most {} are read (is this a safetensors file?)", source,
          length, kMaxHeaderBytes);
  require(length <= file.size() - 8, "{}: truncated: the header has {} bytes but only {} follow its length", source, length,
          file.size() - 8);
  return static_cast<std::size_t>(length);
}

Json parse_header(std::string_view text, const std::string& source) {
  HeaderGuard guard;
  require(Json::sax_parse(text, &guard), "{}: damaged header: {}", source, guard.problem);
  Json header = Json::parse(text, nullptr, false);
  require(header.is_object(), "{}: the header is no JSON object", source);
  return header;
}

std::size_t as_size(const Json& value, const std::string& source, const std::string& name, std::string_view what) {
  require(value.is_number_unsigned(), "{}: tensor '{}': {} is {}; it must be an integer >= 0", source, name, what,
          value.dump());
  const auto number = value.get<std::uint64_t>();
  require(number <= INT64_MAX, "{}: tensor '{}': {} is {}, more than any file holds", source, name, what, number);
  return number;
}

SafetensorsEntry parse_entry(const std::string& name, const Json& json, const std::string& source, std::size_t data_bytes) {
  require(
      json.is_object() && json.size() == 3 && json.contains("dtype") && json.contains("shape") && json.contains("data_offsets"),
      "{}: tensor '{}': the header must give dtype, shape and data_offsets, and nothing else", source, name);
  require(json["dtype"].is_string() && json["shape"].is_array() && json["data_offsets"].is_array() &&
              json["data_offsets"].size() == 2,
          "{}: tensor '{}': dtype must be a string, shape a list, data_offsets a list of two", source, name);
  SafetensorsEntry entry{name, json["dtype"].get<std::string>(), {}, 0, 0};
  const ElementType* type = find_type(entry.dtype);
  require(type != nullptr, "{}: tensor '{}': unknown dtype '{}'", source, name, entry.dtype);
  std::size_t bytes = type->bytes;
  for (const Json& extent : json["shape"]) {
    const std::size_t count = as_size(extent, source, name, "an extent");
    require(!__builtin_mul_overflow(bytes, count, &bytes) && bytes <= INT64_MAX, "{}: tensor '{}': shape {} overflows", source,
            name, json["shape"].dump());
    entry.shape.push_back(static_cast<std::int64_t>(count));
  }
  entry.begin = as_size(json["data_offsets"][0], source, name, "data_offsets[0]");
  entry.end = as_size(json["data_offsets"][1], source, name, "data_offsets[1]");
  require(entry.begin <= entry.end, "{}: tensor '{}': data_offsets {} > {}", source, name, entry.begin, entry.end);
  require(entry.end <= data_bytes, "{}: truncated: tensor '{}' ends at byte {} of the data, which has {}", source, name,
          entry.end, data_bytes);
  require(entry.end - entry.begin == bytes, "{}: tensor '{}': dtype {} and shape {} need {} bytes, data_offsets give {}",
          source, name, entry.dtype, json["shape"].dump(), bytes, entry.end - entry.begin);
  return entry;
}

void check_cover(const SafetensorsHeader& header, const std::string& source, std::size_t data_bytes) {
  std::size_t reached = 0;
  const SafetensorsEntry* before = nullptr;
  for (const SafetensorsEntry& entry : header.entries) {
    const std::string after = before != nullptr ? fmt::format("tensor '{}'", before->name) : "the header";
    require(entry.begin >= reached, "{}: tensor '{}' begins at byte {} of the data, inside {}, which ends at {}", source,
            entry.name, entry.begin, after, reached);
    require(entry.begin == reached, "{}: a hole of {} bytes between {} and tensor '{}'", source, entry.begin - reached, after,
            entry.name);
    reached = entry.end;
    before = &entry;
  }
  require(reached == data_bytes, "{}: {} bytes of data, but the tensors end at {}", source, data_bytes, reached);
}

}  // namespace

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source) {
  const std::size_t length = read_length(file, source);
  const std::size_t data_bytes = file.size() - 8 - length;
  const Json json = parse_header({reinterpret_cast<const char*>(file.data()) + 8, length}, source);
  SafetensorsHeader header;
  header.data_begin = 8 + length;
  for (const auto& [name, value] : json.items()) {
    if (name != "__metadata__") {
      header.entries.push_back(parse_entry(name, value, source, data_bytes));
      continue;
    }
    require(value.is_object(), "{}: __metadata__ is no JSON object", source);
    for (const auto& [key, text] : value.items()) {
      require(text.is_string(), "{}: __metadata__ '{}' is no string", source, key);
      header.metadata[key] = text.get<std::string>();
    }
  }
  std::stable_sort(header.entries.begin(), header.entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  check_cover(header, source, data_bytes);
  return header;
}

struct SafetensorsFile::Mapping {
  void* data = nullptr;
  std::size_t size = 0;

  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    require(file >= 0, "{}: cannot read the tensors: {}", path, std::strerror(errno));
    struct stat status {};
    const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size = regular ? static_cast<std::size_t>(status.st_size) : 0;
    // Private and writable: views are not const, and what is written to them stays in this process.
    if (size > 0) data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    const int error = errno;
    ::close(file);
    require(regular, "{}: no regular file", path);
    require(data != MAP_FAILED, "{}: cannot map the file: {}", path, std::strerror(error));
  }
  ~Mapping() {
    if (data != nullptr && data != MAP_FAILED) ::munmap(data, size);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : mapping_(std::make_unique<Mapping>(path)), path_(path) {
  header_ = parse_safetensors(bytes(), path);
}
SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

std::span<const std::byte> SafetensorsFile::bytes() const {
  return {static_cast<const std::byte*>(mapping_->data), mapping_->size};
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found =
      std::find_if(entries().begin(), entries().end(), [&](const SafetensorsEntry& e) { return e.name == name; });
  return found == entries().end() ? nullptr : &*found;
}

TensorView SafetensorsFile::view(std::string_view name) const {
  const SafetensorsEntry* entry = find(name);
  if (entry == nullptr) {
    std::string names;
    for (const SafetensorsEntry& e : entries()) names += (names.empty() ? "" : ", ") + e.name;
    fail(ErrorCode::kBadInput, "{}: no tensor '{}'; the file has: {}", path_, name,
         names.size() > 400 ? names.substr(0, 400) + " .." : names);
  }
  const ElementType* type = find_type(entry->dtype);
  require(type->dtype.has_value(), "{}: tensor '{}' has dtype {}; F32, BF16, F16, F64 and I32 are read", path_, name,
          entry->dtype);
  require(entry->shape.size() <= kMaxAxes, "{}: tensor '{}' has {} axes; at most {} are read", path_, name, entry->shape.size(),
          kMaxAxes);
  void* data = static_cast<std::byte*>(mapping_->data) + header_.data_begin + entry->begin;
  require(entry->begin == entry->end || reinterpret_cast<std::uintptr_t>(data) % type->bytes == 0,
          "{}: tensor '{}' of {} begins at byte {} of the file, which is not a multiple of {}; save the file again, largest "
          "types first",
          path_, name, entry->dtype, header_.data_begin + entry->begin, type->bytes);
  return TensorView(data, *type->dtype, Shape(std::span<const std::int64_t>(entry->shape)));
}

namespace {

std::string make_header(std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  std::size_t offset = 0;
  std::set<std::string_view> names;
  for (const NamedTensor& tensor : tensors) {
    ensure(tensor.name != "__metadata__" && names.insert(tensor.name).second, "tensor name '{}' is taken", tensor.name);
    const std::size_t end = offset + static_cast<std::size_t>(tensor.view.bytes());
    const auto& extents = tensor.view.shape.extents;
    json[tensor.name] = {{"dtype", word_of(tensor.view.dtype)},
                         {"shape", std::vector<std::int64_t>(extents.begin(), extents.begin() + tensor.view.axes())},
                         {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.resize((text.size() + 8 + kAlign - 1) / kAlign * kAlign - 8, ' ');
  return text;
}

}  // namespace

std::size_t write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                              const std::map<std::string, std::string>& metadata) {
  // Largest elements first, so that every tensor of the file is aligned to its element, as the format asks.
  std::vector<NamedTensor> ordered(tensors.begin(), tensors.end());
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const NamedTensor& a, const NamedTensor& b) { return size_of(a.view.dtype) > size_of(b.view.dtype); });
  const std::string header = make_header(ordered, metadata);
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  std::size_t bytes = length.size() + header.size();
  AtomicFile file(path);
  file.write(length + header);
  for (const NamedTensor& tensor : ordered) {
    if (tensor.view.elements() == 0) continue;
    Tensor packed;
    if (!tensor.view.contiguous() || tensor.view.device.is_cuda()) packed = to_device(tensor.view, Device{});
    const TensorView& view = packed.defined() ? packed.view() : tensor.view;
    file.write({static_cast<const std::byte*>(view.data), static_cast<std::size_t>(view.bytes())});
    bytes += static_cast<std::size_t>(view.bytes());
  }
  file.commit();
  return bytes;
}

}  // namespace dattn
