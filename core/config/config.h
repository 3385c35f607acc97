// YAML -> plain structs. A config struct has one description, from which the reader, the writer and the schema page follow:
//
//   struct TrainConfig { std::int64_t steps = 300; double clip_norm = 1.0; };
//   template <class V> void describe(V& v, TrainConfig& c) {
//     v("steps", c.steps, "optimizer steps");
//     v("clip_norm", c.clip_norm, "largest global gradient norm; 0 = no clipping");
//   }
//   inline void check(const TrainConfig& c, const ConfigCheck& at) {         // optional: ranges and combinations
//     at.require("steps", c.steps >= 1, "must be at least 1");
//   }
//   auto config = load_config<TrainConfig>("train.yaml", {{"steps=10"}});
//
// Member types: bool, int, std::int64_t, double, std::string, an enum with ConfigNames, a described struct, and
// std::optional, std::shared_ptr, std::vector of these. Adding a key is one line in the description.
#pragma once

#include <string>
#include <vector>

#include "core/config/node.h"
#include "core/config/read.h"
#include "core/config/schema.h"
#include "core/config/write.h"

namespace dattn {

// Reads a struct from a tree; every key of the tree must be described. Errors as in node.h.
template <class T>
T read_config(const ConfigNode& root) {
  T value;
  read_value(root, "", value);
  return value;
}

// File, then the overrides in order. Throws Error(kBadInput) naming file:line:column or "--set key".
template <class T>
T load_config(const std::string& path, const std::vector<std::string>& overrides = {}) {
  ConfigNode root = load_config_file(path);
  for (const std::string& assignment : overrides) apply_override(root, assignment);
  return read_config<T>(root);
}

// The same from a text already at hand, such as the config kept in a checkpoint.
template <class T>
T parse_config_as(std::string_view text, const std::string& source, const std::vector<std::string>& overrides = {}) {
  ConfigNode root = parse_config(text, source, true);
  for (const std::string& assignment : overrides) apply_override(root, assignment);
  return read_config<T>(root);
}

}  // namespace dattn
