#include "core/config/schema.h"

#include <fmt/format.h>

namespace dattn {
namespace {

// A cell of a Markdown table: bars would end it.
std::string cell(std::string_view text) {
  std::string safe;
  for (const char c : text) safe += c == '|' ? std::string("\\|") : std::string(1, c);
  return safe;
}

}  // namespace

std::string schema_page(std::string_view title, std::string_view introduction, const std::vector<SchemaRow>& rows) {
  std::string page = fmt::format("# {}\n\n{}\n\n| key | type | default | meaning |\n|---|---|---|---|\n", title, introduction);
  for (const SchemaRow& row : rows) {
    const std::string value = row.value.empty() ? "" : fmt::format("`{}`", cell(row.value));
    page += fmt::format("| `{}` | {} | {} | {} |\n", row.key, cell(row.type), value, cell(row.doc));
  }
  return page;
}

}  // namespace dattn
