#include "plugins/train/checkpoint.h"

#include <fcntl.h>
#include <stdio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/log.h"

namespace dattn {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::string_view kFormat = "dattn-checkpoint";
constexpr int kVersion = 1;
constexpr std::size_t kMaxManifestBytes = std::size_t{1} << 28;

std::string hex(std::uint64_t value) { return fmt::format("{:016x}", value); }

std::uint64_t checksum_of(std::span<const std::byte> bytes) { return XXH64(bytes.data(), bytes.size(), 0); }
std::uint64_t checksum_of(std::string_view text) { return checksum_of(std::as_bytes(std::span(text))); }

// Runs file system work whose failure is the system's, not the caller's.
template <class F>
auto with_system_errors(const std::string& path, F&& work) {
  try {
    return work();
  } catch (const fs::filesystem_error& error) {
    fail(ErrorCode::kSystem, "{}: {}", path, error.code().message());
  }
}

Json to_json_value(const ShardRecord& record) {
  Json parts = Json::array();
  for (const PartRecord& part : record.parts) {
    const auto& extents = part.global.extents;
    parts.push_back({{"name", part.name},
                     {"stored", part.stored},
                     {"shape", std::vector<std::int64_t>(extents.begin(), extents.begin() + part.global.axes)},
                     {"axis", part.axis},
                     {"begin", part.begin},
                     {"count", part.count}});
  }
  return {{"file", record.file}, {"bytes", record.bytes}, {"xxh64", hex(record.checksum)}, {"tensors", std::move(parts)}};
}

ShardRecord shard_from(const Json& json) {
  ShardRecord record{json.at("file").get<std::string>(), json.at("bytes").get<std::uint64_t>(), 0, {}};
  const auto checksum = json.at("xxh64").get<std::string>();
  record.checksum = std::strtoull(checksum.c_str(), nullptr, 16);
  require(hex(record.checksum) == checksum, "checksum '{}' is not 16 hexadecimal digits", checksum);
  require(!record.file.empty() && record.file.find('/') == record.file.npos, "'{}' is no name of a shard", record.file);
  for (const Json& part : json.at("tensors")) {
    const auto extents = part.at("shape").get<std::vector<std::int64_t>>();
    require(extents.size() <= kMaxAxes, "a tensor of {} axes", extents.size());
    record.parts.push_back({part.at("name").get<std::string>(), part.at("stored").get<std::string>(),
                            Shape(std::span<const std::int64_t>(extents)), part.at("axis").get<int>(),
                            part.at("begin").get<std::int64_t>(), part.at("count").get<std::int64_t>()});
  }
  return record;
}

// The manifest's own checksum is over the text of its body: any change of a byte that matters is seen.
std::string manifest_text(const CheckpointManifest& manifest) {
  Json shards = Json::array();
  for (const ShardRecord& shard : manifest.shards) shards.push_back(to_json_value(shard));
  const Json body{{"format", kFormat},         {"version", kVersion},     {"step", manifest.step},
                  {"config", manifest.config}, {"model", manifest.model}, {"alphabet", manifest.alphabet},
                  {"values", manifest.values}, {"shards", shards}};
  const std::string text = body.dump(1, ' ', false, Json::error_handler_t::replace);
  return Json{{"xxh64", hex(checksum_of(text))}, {"body", Json::parse(text)}}.dump(1) + "\n";
}

CheckpointManifest manifest_from(const std::string& text, const std::string& path) {
  try {
    const Json whole = Json::parse(text);
    const Json& body = whole.at("body");
    const std::string found = hex(checksum_of(body.dump(1)));
    const auto stated = whole.at("xxh64").get<std::string>();
    require(found == stated, "its checksum is {}, it states {}", found, stated);
    require(body.at("format") == kFormat && body.at("version") == kVersion,
            "format {} version {}; this program reads {} version {}", body.at("format").dump(), body.at("version").dump(),
            kFormat, kVersion);
    CheckpointManifest manifest{body.at("step"),     body.at("config"), body.at("model"),
                                body.at("alphabet"), body.at("values"), {}};
    for (const Json& shard : body.at("shards")) manifest.shards.push_back(shard_from(shard));
    return manifest;
  } catch (const Json::exception& error) {
    fail(ErrorCode::kBadInput, "{}: damaged manifest: {}", path, error.what());
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: damaged manifest: {}", path, error.what()));
  }
}

std::string folder_name(std::int64_t step) { return fmt::format("step-{:08d}", step); }

// The step of "step-00000300"; nothing for other names.
std::optional<std::int64_t> step_of(const std::string& name) {
  if (name.size() < 13 || name.rfind("step-", 0) != 0) return {};
  std::int64_t step = 0;
  for (const char digit : name.substr(5)) {
    if (digit < '0' || digit > '9' || step > INT64_MAX / 20) return {};
    step = step * 10 + (digit - '0');
  }
  return step;
}

std::vector<std::pair<std::int64_t, fs::path>> checkpoints_newest_first(const std::string& folder) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (const auto step = step_of(entry.path().filename().string())) found.emplace_back(*step, entry.path());
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  return found;
}

std::vector<fs::path> interrupted(const std::string& folder) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const fs::path& path = entry.path();
    if (path.extension() == ".tmp" && step_of(path.stem().string())) found.push_back(path);
  }
  return found;
}

}  // namespace

std::string ShardRecord::to_json() const { return to_json_value(*this).dump(); }

ShardRecord ShardRecord::from_json(std::string_view text) {
  try {
    return shard_from(Json::parse(text));
  } catch (const Json::exception& error) {
    fail(ErrorCode::kBadInput, "damaged shard record: {}", error.what());
  }
}

CheckpointWriter::CheckpointWriter(std::string folder, std::int64_t step)
    : folder_(std::move(folder)), step_(step), final_(folder_ + "/" + folder_name(step)) {
  temporary_ = final_ + ".tmp";
}

void CheckpointWriter::begin() {
  with_system_errors(temporary_, [&] {
    fs::remove_all(temporary_);
    fs::create_directories(temporary_);
  });
}

ShardRecord CheckpointWriter::write_shard(int index, std::span<const TensorPart> parts) {
  ShardRecord record;
  record.file = fmt::format("shard-{:05d}.safetensors", index);
  std::vector<NamedTensor> tensors;
  for (const TensorPart& part : parts) {
    const bool whole = part.global.axes == 0 || part.global == part.view.shape;
    PartRecord stored{
        part.name, part.name, whole ? part.view.shape : part.global, whole ? 0 : part.axis, whole ? 0 : part.begin, 0};
    ensure(whole || (part.axis >= 0 && part.axis < part.global.axes && part.global.axes == part.view.axes()),
           "tensor '{}': axis {} of a part {} of {}", part.name, part.axis, part.view.shape.text(), part.global.text());
    stored.count = stored.global.axes > 0 ? part.view.size(stored.axis) : 1;
    Shape expected = stored.global;
    if (!whole) expected[stored.axis] = stored.count;
    ensure(expected == part.view.shape && stored.begin >= 0 &&
               (whole || stored.begin + stored.count <= stored.global[stored.axis]),
           "tensor '{}': rows [{}, {}) of axis {} of {} cannot have shape {}", part.name, stored.begin,
           stored.begin + stored.count, stored.axis, stored.global.text(), part.view.shape.text());
    if (!whole) stored.stored += fmt::format("@{}", stored.begin);
    tensors.push_back({stored.stored, part.view});
    record.parts.push_back(std::move(stored));
  }
  const std::string path = temporary_ + "/" + record.file;
  record.bytes = write_safetensors(path, tensors);
  // Read back: what the checksum vouches for is what stands in the file.
  const SafetensorsFile file(path);
  record.checksum = checksum_of(file.bytes());
  return record;
}

std::string CheckpointWriter::finish(const CheckpointManifest& manifest) {
  ensure(manifest.step == step_, "a manifest of step {} for a checkpoint of step {}", manifest.step, step_);
  write_file(temporary_ + "/manifest.json", manifest_text(manifest));
  sync_folder(temporary_);
  if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, final_.c_str(), RENAME_NOREPLACE) != 0) {
    // A damaged checkpoint of this step stands there: swap it for the whole one, or, where the file system cannot, remove it
    // first.
    const bool swapped = ::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, final_.c_str(), RENAME_EXCHANGE) == 0;
    with_system_errors(final_, [&] {
      fs::remove_all(swapped ? temporary_ : final_);
      if (!swapped) fs::rename(temporary_, final_);
    });
  }
  sync_folder(folder_);
  return final_;
}

void CheckpointWriter::abandon() noexcept {
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
}

CheckpointReader::CheckpointReader(const std::string& checkpoint, Verify verify) : path_(checkpoint) {
  const std::string manifest_path = path_ + "/manifest.json";
  manifest_ = manifest_from(read_file(manifest_path, "manifest", kMaxManifestBytes), manifest_path);
  for (std::size_t i = 0; i < manifest_.shards.size(); ++i) {
    const ShardRecord& shard = manifest_.shards[i];
    const std::string file = path_ + "/" + shard.file;
    std::error_code error;
    const auto bytes = fs::file_size(file, error);
    require(!error, "{}: missing shard: {}", file, error.message());
    require(bytes == shard.bytes, "{}: damaged: {} bytes, the manifest states {}", file, bytes, shard.bytes);
    const SafetensorsFile& opened = shards_.emplace_back(file);
    if (verify == Verify::kChecksums) {
      const std::uint64_t found = checksum_of(opened.bytes());
      require(found == shard.checksum, "{}: damaged: its checksum is {}, the manifest states {}", file, hex(found),
              hex(shard.checksum));
    }
    for (const PartRecord& part : shard.parts) {
      std::vector<Located>& all = parts_[part.name];
      require(opened.has(part.stored), "{}: tensor '{}' is missing", file, part.stored);
      Shape expected = part.global;
      const bool axis_ok = part.axis >= 0 && (part.axis < part.global.axes || part.global.axes == 0);
      if (axis_ok && part.global.axes > 0) expected[part.axis] = part.count;
      require(axis_ok && part.begin >= 0 && opened.view(part.stored).shape == expected,
              "{}: tensor '{}' does not match the manifest", file, part.stored);
      require(all.empty() || (all[0].part.global == part.global && all[0].part.axis == part.axis),
              "{}: tensor '{}' has two shapes", path_, part.name);
      all.push_back({part, i});
    }
  }
}

const std::vector<CheckpointReader::Located>& CheckpointReader::parts_of(std::string_view name) const {
  const auto found = parts_.find(std::string(name));
  require(found != parts_.end(), "{}: no tensor '{}'; the checkpoint holds {} others", path_, name, parts_.size());
  return found->second;
}

std::vector<std::string> CheckpointReader::names() const {
  std::vector<std::string> all;
  for (const auto& [name, parts] : parts_) all.push_back(name);
  return all;
}

Shape CheckpointReader::shape(std::string_view name) const { return parts_of(name)[0].part.global; }

DType CheckpointReader::dtype(std::string_view name) const {
  const Located& first = parts_of(name)[0];
  return shards_[first.shard].view(first.part.stored).dtype;
}

Tensor CheckpointReader::read(std::string_view name) const {
  Tensor result = Tensor::uninitialized(dtype(name), shape(name));
  if (result->axes() == 0) {
    const Located& first = parts_of(name)[0];
    copy(shards_[first.shard].view(first.part.stored), result);
  } else if (result->elements() > 0) {
    read_rows(name, parts_of(name)[0].part.axis, 0, result);
  }
  return result;
}

void CheckpointReader::read_rows(std::string_view name, int axis, std::int64_t begin, const TensorView& to) const {
  const std::vector<Located>& parts = parts_of(name);
  const Shape global = parts[0].part.global;
  Shape wanted = global;
  if (axis >= 0 && axis < global.axes) wanted[axis] = to.axes() == global.axes ? to.size(axis) : -1;
  require(wanted == to.shape && begin >= 0 && begin + wanted[axis] <= global[axis],
          "{}: tensor '{}' is {}; rows from {} of axis {} cannot fill {}", path_, name, global.text(), begin, axis,
          to.shape.text());
  // [done, end) of the stored axis is still to be copied; where the request cuts another axis, all of it.
  const int stored_axis = parts[0].part.axis;
  const bool same_axis = stored_axis == axis;
  std::vector<Located> ordered = parts;
  std::sort(ordered.begin(), ordered.end(), [](const Located& a, const Located& b) { return a.part.begin < b.part.begin; });
  std::int64_t done = same_axis ? begin : 0;
  const std::int64_t first = done;
  const std::int64_t end = same_axis ? begin + wanted[axis] : global[stored_axis];
  for (const Located& located : ordered) {
    const std::int64_t stop = std::min(end, located.part.begin + located.part.count);
    if (located.part.begin > done || stop <= done) continue;
    TensorView from =
        shards_[located.shard].view(located.part.stored).slice(stored_axis, done - located.part.begin, stop - done);
    if (!same_axis) from = from.slice(axis, begin, wanted[axis]);
    copy(from, to.slice(stored_axis, done - first, stop - done));
    done = stop;
  }
  require(done >= end, "{}: tensor '{}': no shard holds row {} of axis {}", path_, name, done, stored_axis);
}

void CheckpointReader::require_model(std::span<const Expected> expected, std::string_view prefix) const {
  std::map<std::string_view, bool> seen;
  for (const Expected& tensor : expected) {
    require(has(tensor.name),
            "{} is a checkpoint of another model: it has no tensor '{}' {}; change the config or train afresh", path_,
            tensor.name, tensor.global.text());
    require(
        shape(tensor.name) == tensor.global,
        "{} is a checkpoint of another model: tensor '{}' is {} there and {} in the config; change the config or train afresh",
        path_, tensor.name, shape(tensor.name).text(), tensor.global.text());
    seen[tensor.name] = true;
  }
  for (const auto& [name, parts] : parts_) {
    const bool left_over = name.rfind(prefix, 0) == 0 && !seen.count(name);
    require(!left_over, "{} is a checkpoint of another model: its tensor '{}' {} has no place in the config's model", path_,
            name, parts[0].part.global.text());
  }
}

std::optional<std::string> latest_checkpoint(const std::string& folder) {
  if (std::error_code ignored; !fs::is_directory(folder, ignored)) return {};
  return with_system_errors(folder, [&]() -> std::optional<std::string> {
    for (const fs::path& path : interrupted(folder))
      info("warning: {} was interrupted while it was written; passed over", path.string());
    for (const auto& [step, path] : checkpoints_newest_first(folder)) {
      try {
        CheckpointReader reader(path.string());
        return path.string();
      } catch (const Error& error) {
        info("warning: checkpoint {} is damaged and passed over: {}", path.string(), error.what());
      }
    }
    return {};
  });
}

void keep_newest(const std::string& folder, std::int64_t keep) {
  require(keep >= 1, "at least 1 checkpoint is kept, not {}", keep);
  with_system_errors(folder, [&] {
    const auto all = checkpoints_newest_first(folder);
    for (std::size_t i = static_cast<std::size_t>(keep); i < all.size(); ++i) fs::remove_all(all[i].second);
    for (const fs::path& path : interrupted(folder)) {
      if (!all.empty() && *step_of(path.stem().string()) < all[0].first) fs::remove_all(path);
    }
  });
}

}  // namespace dattn
