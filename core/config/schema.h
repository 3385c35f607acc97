// The schema page: every key with its type, default and meaning, from the same descriptions that the reader uses.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/config/write.h"

namespace dattn {

struct SchemaRow {
  std::string key;  // "train.steps", "attention.mask.regions[].q"
  std::string type;
  std::string value;  // default; empty for none
  std::string doc;
};

std::string schema_page(std::string_view title, std::string_view introduction, const std::vector<SchemaRow>& rows);

template <class T>
struct SchemaType {  // bool, int, std::int64_t, double, std::string
  static std::string name() {
    if constexpr (std::is_same_v<T, bool>)
      return "true or false";
    else if constexpr (std::is_integral_v<T>)
      return "integer";
    else if constexpr (std::is_floating_point_v<T>)
      return "number";
    else
      return "text";
  }
};
template <ConfigEnum T>
struct SchemaType<T> {
  static std::string name() {
    std::string names;
    for (const auto& [name, unused] : ConfigNames<T>::kAll) names += (names.empty() ? "" : ", ") + std::string(name);
    return "one of: " + names;
  }
};
template <Described T>
struct SchemaType<T> {
  static std::string name() { return "map"; }
};
template <class T>
struct SchemaType<std::optional<T>> {
  static std::string name() { return SchemaType<T>::name() + " or null"; }
};
template <class T>
struct SchemaType<std::shared_ptr<T>> {
  static std::string name() { return SchemaType<T>::name() + " or null"; }
};
template <class T>
struct SchemaType<std::vector<T>> {
  static std::string name() {
    const std::string item = SchemaType<T>::name();
    return "list of " + (item.find(" or ") == item.npos ? item : "(" + item + ")");
  }
};

// The visitor that a description is run with. Structs inside structs are followed; a struct inside itself is not.
class SchemaWriter {
 public:
  template <class T>
  void operator()(std::string_view key, const T& value, std::string_view doc) {
    const std::string path = prefix + std::string(key);
    const ConfigNode node = to_node(value);
    const bool plain = node.kind == ConfigNode::Kind::kScalar || node.kind == ConfigNode::Kind::kList;
    rows.push_back({path, SchemaType<T>::name(), plain ? to_json(node) : "", std::string(doc)});
    follow(path, static_cast<const T*>(nullptr));
  }

  std::string prefix;
  std::vector<SchemaRow> rows;

 private:
  template <class T>
  void follow(const std::string& path, const T*) {
    if constexpr (Described<T>) {
      static const char kTag = 0;  // one address for each type
      if (std::find(open_.begin(), open_.end(), &kTag) != open_.end()) return;
      open_.push_back(&kTag);
      const std::string before = std::exchange(prefix, path + ".");
      T value;
      describe(*this, value);
      prefix = before;
      open_.pop_back();
    }
  }
  template <class T>
  void follow(const std::string& path, const std::optional<T>*) {
    follow(path, static_cast<const T*>(nullptr));
  }
  template <class T>
  void follow(const std::string& path, const std::shared_ptr<T>*) {
    follow(path, static_cast<const T*>(nullptr));
  }
  template <class T>
  void follow(const std::string& path, const std::vector<T>*) {
    follow(path + "[]", static_cast<const T*>(nullptr));
  }

  std::vector<const char*> open_;
};

template <Described T>
std::vector<SchemaRow> schema_of() {
  SchemaWriter writer;
  T value;
  describe(writer, value);
  return std::move(writer.rows);
}

}  // namespace dattn
