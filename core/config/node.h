// A config as a tree of plain nodes, each knowing its place in the text. Reading is strict: what YAML allows but a config
// has no use for (anchors, aliases, tags, several documents, duplicate keys, deep nesting) is refused here, so that the
// rest of the library sees maps, lists and scalars only. Parsed by yaml-cpp; other files need not know it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dattn {

inline constexpr std::size_t kMaxConfigBytes = std::size_t{1} << 20;
inline constexpr int kMaxConfigDepth = 32;

// Where a node was written: "configs/train.yaml:12:3", or "--set a.b" for an override (line 0).
struct Place {
  std::shared_ptr<const std::string> source;
  int line = 0;  // from 1
  int column = 0;

  std::string text() const;
};

struct ConfigEntry;

struct ConfigNode {
  enum class Kind { kNull, kScalar, kList, kMap };

  Kind kind = Kind::kNull;
  std::string text;                  // scalar
  bool quoted = false;               // scalar: a string whatever it looks like
  std::vector<ConfigNode> items;     // list
  std::vector<ConfigEntry> entries;  // map, in the order of the text, keys distinct
  Place place;

  const ConfigNode* find(std::string_view key) const;  // map: the value of a key; null where absent
  std::string summary() const;                         // for messages: "'abc'", "a map", "a list", "nothing"
};

struct ConfigEntry {
  std::string key;
  Place place;
  ConfigNode value;
};

// Throws Error(kBadInput) with "source:line:column: what". An empty text is an empty map where `allow_empty`.
ConfigNode parse_config(std::string_view text, const std::string& source, bool allow_empty = false);
ConfigNode load_config_file(const std::string& path);

// Applies "a.b.c=value", the value in YAML ("mesh.ring=2", "attention.mask={kind: full}"); later ones win.
void apply_override(ConfigNode& root, const std::string& assignment);

std::string to_yaml(const ConfigNode& node);  // parses back to the same tree
std::string to_json(const ConfigNode& node);  // one line

}  // namespace dattn
