#include "core/config/read.h"

#include <charconv>
#include <cmath>
#include <numeric>

namespace dattn {
namespace {

// Letters to insert, delete, replace or swap with their neighbour (optimal string alignment).
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> cost(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) cost[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) cost[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replace = cost[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, replace});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  }
  return cost[a.size()][b.size()];
}

std::string suggestion(std::string_view word, const std::vector<std::string>& known) {
  const std::string near = nearest(word, known);
  if (!near.empty()) return fmt::format(" (did you mean '{}'?)", near);
  return known.empty() ? "" : fmt::format("; known: {}", joined(known));
}

[[noreturn]] void fail_type(const ConfigNode& node, const std::string& path, std::string_view wanted) {
  const std::string what = path.empty() ? "the config" : path;
  fail_at(node.place, fmt::format("{} needs {}, not {}", what, wanted, node.summary()));
}

template <class T>
T read_integer(const ConfigNode& node, const std::string& path) {
  if (node.kind != ConfigNode::Kind::kScalar || node.quoted) fail_type(node, path, "an integer");
  T number{};
  const char* end = node.text.data() + node.text.size();
  const auto [stop, status] = std::from_chars(node.text.data(), end, number);
  if (status == std::errc::result_out_of_range && stop == end) {
    fail_at(node.place, fmt::format("{} is {}, which does not lie in [{}, {}]", path, node.text, std::numeric_limits<T>::min(),
                                    std::numeric_limits<T>::max()));
  }
  if (status != std::errc{} || stop != end) fail_type(node, path, "an integer");
  return number;
}

}  // namespace

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ", ") + word;
  return all;
}

std::string nearest(std::string_view word, const std::vector<std::string>& known) {
  std::string best;
  std::size_t least = std::max<std::size_t>(1, std::min<std::size_t>(word.size(), 40) / 3) + 1;
  if (word.size() > 40) return best;
  for (const std::string& candidate : known) {
    const std::size_t distance = edit_distance(word, candidate);
    if (distance < least) {
      least = distance;
      best = candidate;
    }
  }
  return best;
}

void fail_at(const Place& place, const std::string& message) { fail(ErrorCode::kBadInput, "{}: {}", place.text(), message); }

Place ConfigCheck::place(std::string_view key) const {
  const ConfigNode* found = node_.find(key);
  return found != nullptr ? found->place : node_.place;
}

void ConfigCheck::refuse(std::string_view key, const std::string& why) const {
  const ConfigNode* found = node_.find(key);
  const bool plain = found != nullptr && found->kind == ConfigNode::Kind::kScalar;
  fail_at(place(key), fmt::format("{}{} {}", name(key), plain ? fmt::format(" is {}; it", found->summary()) : "", why));
}

void ConfigReader::refuse_unknown() const {
  for (const ConfigEntry& entry : node_.entries) {
    if (std::find(known_.begin(), known_.end(), entry.key) != known_.end()) continue;
    const std::string section = path_.empty() ? "" : fmt::format(" in '{}'", path_);
    fail_at(entry.place, fmt::format("unknown key '{}'{}{}", entry.key, section, suggestion(entry.key, known_)));
  }
}

void require_kind(const ConfigNode& node, const std::string& path, ConfigNode::Kind kind) {
  if (node.kind != kind) fail_type(node, path, kind == ConfigNode::Kind::kMap ? "a map" : "a list");
}

void read_value(const ConfigNode& node, const std::string& path, bool& value) {
  const bool yes = node.text == "true";
  if (node.kind != ConfigNode::Kind::kScalar || node.quoted || (!yes && node.text != "false")) {
    fail_type(node, path, "true or false");
  }
  value = yes;
}

void read_value(const ConfigNode& node, const std::string& path, int& value) { value = read_integer<int>(node, path); }

void read_value(const ConfigNode& node, const std::string& path, std::int64_t& value) {
  value = read_integer<std::int64_t>(node, path);
}

void read_value(const ConfigNode& node, const std::string& path, double& value) {
  if (node.kind != ConfigNode::Kind::kScalar || node.quoted) fail_type(node, path, "a number");
  double number = 0;
  const char* end = node.text.data() + node.text.size();
  const auto [stop, status] = std::from_chars(node.text.data(), end, number);
  if (status == std::errc::result_out_of_range && stop == end) {
    fail_at(node.place, fmt::format("{} is {}, which no double holds", path, node.text));
  }
  if (status != std::errc{} || stop != end || !std::isfinite(number)) fail_type(node, path, "a finite number");
  value = number;
}

void read_value(const ConfigNode& node, const std::string& path, std::string& value) {
  if (node.kind != ConfigNode::Kind::kScalar) fail_type(node, path, "text");
  value = node.text;
}

std::size_t read_name(const ConfigNode& node, const std::string& path, const std::vector<std::string>& names) {
  if (node.kind != ConfigNode::Kind::kScalar) fail_type(node, path, "one of " + joined(names));
  const auto found = std::find(names.begin(), names.end(), node.text);
  if (found == names.end()) fail_at(node.place, fmt::format("{} is '{}', not one of: {}", path, node.text, joined(names)));
  return static_cast<std::size_t>(found - names.begin());
}

}  // namespace dattn
