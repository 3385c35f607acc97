#include "core/config/node.h"

#include <algorithm>
#include <set>
#include <sstream>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/config/read.h"

namespace dattn {
namespace {

// What a text is called in messages, and whether lines mean anything in it (not in an override).
struct Source {
  std::shared_ptr<const std::string> name;
  bool lines = true;
};

Place place_of(const YAML::Mark& mark, const Source& source) {
  if (!source.lines) return {source.name, 0, 0};
  if (mark.is_null()) return {source.name, 1, 1};
  return {source.name, mark.line + 1, mark.column + 1};
}

// Refuses, from the parser's events, what yaml-cpp's nodes no longer show: anchors, aliases, tags and further documents.
// It also bounds the nesting, so that nothing that recurses over the tree can run out of stack.
class Guard final : public YAML::EventHandler {
 public:
  explicit Guard(Source source) : source_(std::move(source)) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) refuse(mark, "a second document; keep one document to a file");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "aliases ('*name') are not used here; write the value out");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, const std::string&) override {
    plain(mark, tag);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, YAML::EmitterStyle::value) override {
    nested(mark, tag);
  }
  void OnSequenceEnd() override { --depth_; }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t, YAML::EmitterStyle::value) override {
    nested(mark, tag);
  }
  void OnMapEnd() override { --depth_; }
  void OnAnchor(const YAML::Mark& mark, const std::string& name) override {
    refuse(mark, fmt::format("anchors ('&{}') are not used here; write the value out", name));
  }

 private:
  void plain(const YAML::Mark& mark, const std::string& tag) const {
    if (!tag.empty() && tag != "?" && tag != "!") refuse(mark, fmt::format("tags ('{}') are not used here; remove it", tag));
  }
  void nested(const YAML::Mark& mark, const std::string& tag) {
    plain(mark, tag);
    if (++depth_ > kMaxConfigDepth) refuse(mark, fmt::format("nested deeper than {} levels", kMaxConfigDepth));
  }
  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& why) const { fail_at(place_of(mark, source_), why); }

  Source source_;
  int documents_ = 0;
  int depth_ = 0;
};

ConfigNode convert(const YAML::Node& node, const Source& source);

ConfigNode convert_map(const YAML::Node& node, const Source& source) {
  ConfigNode map;
  map.kind = ConfigNode::Kind::kMap;
  std::set<std::string> seen;
  for (const auto& entry : node) {
    const Place place = place_of(entry.first.Mark(), source);
    if (!entry.first.IsScalar()) fail_at(place, "a key must be a word");
    const std::string& key = entry.first.Scalar();
    if (!seen.insert(key).second) fail_at(place, fmt::format("duplicate key '{}'; keep one of them", key));
    map.entries.push_back({key, place, convert(entry.second, source)});
  }
  return map;
}

ConfigNode convert(const YAML::Node& node, const Source& source) {
  ConfigNode result;
  switch (node.Type()) {
    case YAML::NodeType::Map: result = convert_map(node, source); break;
    case YAML::NodeType::Sequence:
      result.kind = ConfigNode::Kind::kList;
      for (const auto& item : node) result.items.push_back(convert(item, source));
      break;
    case YAML::NodeType::Scalar:
      result.kind = ConfigNode::Kind::kScalar;
      result.text = node.Scalar();
      result.quoted = node.Tag() == "!";  // yaml-cpp's mark of a quoted scalar
      break;
    default: break;
  }
  result.place = place_of(node.Mark(), source);
  return result;
}

ConfigNode parse(const std::string& text, const Source& source) {
  const Place start = place_of(YAML::Mark::null_mark(), source);
  if (text.size() > kMaxConfigBytes)
    fail_at(start, fmt::format("{} bytes; a config has at most {}", text.size(), kMaxConfigBytes));
  if (text.find('\0') != text.npos) fail_at(start, "a zero byte in the text; a config is plain text");
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    Guard guard(source);
    while (parser.HandleNextDocument(guard)) {
    }
    return convert(YAML::Load(text), source);
  } catch (const YAML::Exception& error) {
    fail_at(place_of(error.mark, source), error.msg);
  }
}

}  // namespace

std::string Place::text() const {
  if (!source) return "config";
  return line > 0 ? fmt::format("{}:{}:{}", *source, line, column) : *source;
}

const ConfigNode* ConfigNode::find(std::string_view key) const {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const ConfigEntry& entry) { return entry.key == key; });
  return found == entries.end() ? nullptr : &found->value;
}

std::string ConfigNode::summary() const {
  switch (kind) {
    case Kind::kMap: return "a map";
    case Kind::kList: return "a list";
    case Kind::kScalar: return text.size() <= 60 ? fmt::format("'{}'", text) : fmt::format("'{}..'", text.substr(0, 57));
    default: return "nothing";
  }
}

ConfigNode parse_config(std::string_view text, const std::string& source, bool allow_empty) {
  ConfigNode root = parse(std::string(text), {std::make_shared<const std::string>(source), true});
  if (root.kind == ConfigNode::Kind::kNull) {
    if (!allow_empty) fail_at(root.place, "the config is empty");
    root.kind = ConfigNode::Kind::kMap;
  }
  return root;
}

ConfigNode load_config_file(const std::string& path) { return parse_config(read_file(path, "config", kMaxConfigBytes), path); }

void apply_override(ConfigNode& root, const std::string& assignment) {
  const std::size_t equals = assignment.find('=');
  const std::string key = assignment.substr(0, equals);
  const auto source = std::make_shared<const std::string>("--set " + key);
  const bool dots_ok = !key.empty() && key.front() != '.' && key.back() != '.' && key.find("..") == key.npos;
  if (equals == assignment.npos || !dots_ok) {
    fail_at({source, 0, 0}, "write --set key=value, with dots between the names, such as --set train.steps=10");
  }
  ConfigNode holder = parse("value: " + assignment.substr(equals + 1), {source, false});
  if (holder.entries.size() != 1) fail_at({source, 0, 0}, "the value must be one line of YAML");
  ConfigNode* node = &root;
  for (std::size_t begin = 0; begin <= key.size();) {
    const std::size_t end = std::min(key.find('.', begin), key.size());
    const std::string name = key.substr(begin, end - begin);
    if (node->kind != ConfigNode::Kind::kMap) {  // a default, or a scalar that the user means to replace by a map
      *node = {};
      node->kind = ConfigNode::Kind::kMap;
      node->place = {source, 0, 0};
    }
    auto found = std::find_if(node->entries.begin(), node->entries.end(), [&](const ConfigEntry& e) { return e.key == name; });
    if (found == node->entries.end()) found = node->entries.insert(found, {name, {source, 0, 0}, {}});
    found->place = end == key.size() ? Place{source, 0, 0} : found->place;
    node = &found->value;
    begin = end + 1;
  }
  *node = std::move(holder.entries[0].value);
}

}  // namespace dattn
