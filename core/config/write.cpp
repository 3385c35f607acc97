#include "core/config/write.h"

#include <charconv>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace dattn {
namespace {

using Kind = ConfigNode::Kind;

ConfigNode scalar(std::string text, bool quoted) {
  ConfigNode node;
  node.kind = Kind::kScalar;
  node.text = std::move(text);
  node.quoted = quoted;
  return node;
}

// A JSON string is a YAML double-quoted string too.
std::string quote(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// Words that YAML reads as text without quotes: letters first, then letters, digits and a few marks.
std::string yaml_text(const std::string& text) {
  static const std::vector<std::string> kReserved{"true", "false", "null", "yes", "no", "on", "off", "nan", "inf"};
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  bool plain = !text.empty() && letter(text[0]) && text.size() <= 80;
  for (const char c : text)
    plain = plain && (letter(c) || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '/' || c == '.');
  std::string lower = text;
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  plain = plain && std::find(kReserved.begin(), kReserved.end(), lower) == kReserved.end();
  return plain ? text : quote(text);
}

void flow_yaml(const ConfigNode& node, std::string& out) {
  switch (node.kind) {
    case Kind::kNull: out += "null"; break;
    case Kind::kScalar: out += node.quoted ? yaml_text(node.text) : node.text; break;
    case Kind::kList:
      out += '[';
      for (std::size_t i = 0; i < node.items.size(); ++i) {
        if (i > 0) out += ", ";
        flow_yaml(node.items[i], out);
      }
      out += ']';
      break;
    case Kind::kMap:
      out += '{';
      for (std::size_t i = 0; i < node.entries.size(); ++i) {
        if (i > 0) out += ", ";
        out += yaml_text(node.entries[i].key) + ": ";
        flow_yaml(node.entries[i].value, out);
      }
      out += '}';
      break;
  }
}

// Maps as blocks, one key a line; lists and what they hold in brackets.
void block_yaml(const ConfigNode& map, std::size_t indent, std::string& out) {
  for (const ConfigEntry& entry : map.entries) {
    out += std::string(indent, ' ') + yaml_text(entry.key) + ':';
    if (entry.value.kind == Kind::kMap && !entry.value.entries.empty()) {
      out += '\n';
      block_yaml(entry.value, indent + 2, out);
    } else {
      out += ' ';
      flow_yaml(entry.value, out);
      out += '\n';
    }
  }
}

}  // namespace

ConfigNode to_node(bool value) { return scalar(value ? "true" : "false", false); }
ConfigNode to_node(int value) { return scalar(std::to_string(value), false); }
ConfigNode to_node(std::int64_t value) { return scalar(std::to_string(value), false); }
ConfigNode to_node(const std::string& value) { return scalar(value, true); }

ConfigNode to_node(double value) {
  char text[32];
  const auto result = std::to_chars(text, text + sizeof text, value);
  return scalar(std::string(text, result.ptr), false);
}

std::string to_yaml(const ConfigNode& node) {
  std::string out;
  if (node.kind == Kind::kMap && !node.entries.empty()) {
    block_yaml(node, 0, out);
  } else {
    flow_yaml(node, out);
    out += '\n';
  }
  return out;
}

std::string to_json(const ConfigNode& node) {
  std::string out;
  switch (node.kind) {
    case Kind::kNull: return "null";
    case Kind::kScalar: return node.quoted ? quote(node.text) : node.text;
    case Kind::kList:
      for (const ConfigNode& item : node.items) out += (out.empty() ? "" : ", ") + to_json(item);
      return "[" + out + "]";
    case Kind::kMap:
      for (const ConfigEntry& entry : node.entries) {
        out += (out.empty() ? "" : ", ") + quote(entry.key) + ": " + to_json(entry.value);
      }
      return "{" + out + "}";
  }
  return out;
}

}  // namespace dattn
