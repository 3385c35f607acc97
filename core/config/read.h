// The reader: fills plain structs from a config tree, key by key as their description names them. See config.h.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/config/node.h"

namespace dattn {

class ConfigReader;

// Specialise with `static constexpr std::array<std::pair<std::string_view, T>, N> kAll` to make an enum a config type.
template <class T>
struct ConfigNames;

template <class T>
concept ConfigEnum = requires {
  ConfigNames<T>::kAll.size();
};

template <class T>
concept Described = std::is_class_v<T> && requires(ConfigReader& v, T& t) {
  describe(v, t);
};

// The known word nearest to a mistyped one; empty where none is near (edit distance at most a third of its letters).
std::string nearest(std::string_view word, const std::vector<std::string>& known);
std::string joined(const std::vector<std::string>& words);  // "a, b, c"

// Throws Error(kBadInput) "place: message".
[[noreturn]] void fail_at(const Place& place, const std::string& message);

// What a struct's check() is given: the places of its keys. Messages read "place: train.steps is 0; must be .."
class ConfigCheck {
 public:
  ConfigCheck(const ConfigNode& node, std::string path) : node_(node), path_(std::move(path)) {}

  bool given(std::string_view key) const { return node_.find(key) != nullptr; }
  Place place(std::string_view key) const;  // of the key; of the struct where the key is not given
  std::string name(std::string_view key) const { return path_.empty() ? std::string(key) : path_ + "." + std::string(key); }
  // Refuses the value of a key: "place: train.steps (0) must be at least 1".
  template <class... Args>
  void require(std::string_view key, bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) refuse(key, fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  [[noreturn]] void refuse(std::string_view key, const std::string& why) const;

  const ConfigNode& node_;
  std::string path_;
};

template <class T>
concept Checked = requires(const T& t, const ConfigCheck& at) {
  check(t, at);
};

void read_value(const ConfigNode& node, const std::string& path, bool& value);
void read_value(const ConfigNode& node, const std::string& path, int& value);
void read_value(const ConfigNode& node, const std::string& path, std::int64_t& value);
void read_value(const ConfigNode& node, const std::string& path, double& value);
void read_value(const ConfigNode& node, const std::string& path, std::string& value);
std::size_t read_name(const ConfigNode& node, const std::string& path, const std::vector<std::string>& names);
void require_kind(const ConfigNode& node, const std::string& path, ConfigNode::Kind kind);

template <ConfigEnum T>
void read_value(const ConfigNode& node, const std::string& path, T& value);
template <Described T>
void read_value(const ConfigNode& node, const std::string& path, T& value);
template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::optional<T>& value);
template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::shared_ptr<T>& value);
template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::vector<T>& value);

// The visitor that a description is run with.
class ConfigReader {
 public:
  ConfigReader(const ConfigNode& node, std::string path) : node_(node), path_(std::move(path)) {}

  template <class T>
  void operator()(std::string_view key, T& value, std::string_view /*doc*/) {
    known_.emplace_back(key);
    if (const ConfigNode* found = node_.find(key))
      read_value(*found, path_.empty() ? known_.back() : path_ + "." + known_.back(), value);
  }
  void refuse_unknown() const;  // throws naming the first key that the description lacks

 private:
  const ConfigNode& node_;
  std::string path_;
  std::vector<std::string> known_;
};

template <ConfigEnum T>
void read_value(const ConfigNode& node, const std::string& path, T& value) {
  std::vector<std::string> names;
  for (const auto& [name, unused] : ConfigNames<T>::kAll) names.emplace_back(name);
  value = ConfigNames<T>::kAll[read_name(node, path, names)].second;
}

template <Described T>
void read_value(const ConfigNode& node, const std::string& path, T& value) {
  require_kind(node, path, ConfigNode::Kind::kMap);
  ConfigReader reader(node, path);
  describe(reader, value);
  reader.refuse_unknown();
  if constexpr (Checked<T>) check(value, ConfigCheck(node, path));
}

template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::optional<T>& value) {
  value.reset();
  if (node.kind != ConfigNode::Kind::kNull) read_value(node, path, value.emplace());
}

template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::shared_ptr<T>& value) {
  value.reset();
  if (node.kind == ConfigNode::Kind::kNull) return;
  auto fresh = std::make_shared<std::remove_const_t<T>>();
  read_value(node, path, *fresh);
  value = std::move(fresh);
}

template <class T>
void read_value(const ConfigNode& node, const std::string& path, std::vector<T>& value) {
  require_kind(node, path, ConfigNode::Kind::kList);
  value.clear();
  for (std::size_t i = 0; i < node.items.size(); ++i) {
    value.emplace_back();
    read_value(node.items[i], fmt::format("{}[{}]", path, i), value.back());
  }
}

}  // namespace dattn
