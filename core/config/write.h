// The writer: a described struct as a config tree, for the resolved config of a run. to_yaml(to_node(c)) reads back equal.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/config/read.h"

namespace dattn {

ConfigNode to_node(bool value);
ConfigNode to_node(int value);
ConfigNode to_node(std::int64_t value);
ConfigNode to_node(double value);  // the shortest text that reads back as the same number
ConfigNode to_node(const std::string& value);

template <ConfigEnum T>
ConfigNode to_node(T value);
template <Described T>
ConfigNode to_node(const T& value);
template <class T>
ConfigNode to_node(const std::optional<T>& value);
template <class T>
ConfigNode to_node(const std::shared_ptr<T>& value);
template <class T>
ConfigNode to_node(const std::vector<T>& value);

// The visitor that a description is run with. Absent optionals are left out.
class ConfigWriter {
 public:
  template <class T>
  void operator()(std::string_view key, const T& value, std::string_view /*doc*/) {
    ConfigNode child = to_node(value);
    if (child.kind == ConfigNode::Kind::kNull) return;
    node.entries.push_back({std::string(key), {}, std::move(child)});
  }

  ConfigNode node;
};

template <ConfigEnum T>
ConfigNode to_node(T value) {
  for (const auto& [name, other] : ConfigNames<T>::kAll) {
    if (other == value) return to_node(std::string(name));
  }
  fail(ErrorCode::kInternal, "an enum value {} has no config name", static_cast<int>(value));
}

template <Described T>
ConfigNode to_node(const T& value) {
  T copy = value;  // descriptions take a mutable struct, for the reader's sake
  ConfigWriter writer;
  writer.node.kind = ConfigNode::Kind::kMap;
  describe(writer, copy);
  return std::move(writer.node);
}

template <class T>
ConfigNode to_node(const std::optional<T>& value) {
  return value ? to_node(*value) : ConfigNode{};
}

template <class T>
ConfigNode to_node(const std::shared_ptr<T>& value) {
  return value ? to_node(*value) : ConfigNode{};
}

template <class T>
ConfigNode to_node(const std::vector<T>& value) {
  ConfigNode node;
  node.kind = ConfigNode::Kind::kList;
  for (const T& item : value) node.items.push_back(to_node(item));
  return node;
}

}  // namespace dattn
