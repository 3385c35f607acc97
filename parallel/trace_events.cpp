#include "parallel/trace_events.h"

#include <fmt/format.h>

namespace dattn {
namespace {

// JSON string without its quotes.
std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

void TraceEvents::name_rank(int rank) {
  add(fmt::format(R"({{"ph":"M","name":"process_name","pid":{0},"tid":0,"args":{{"name":"rank {0}"}}}})", rank));
}

void TraceEvents::name_track(int rank, int track, std::string_view name) {
  add(fmt::format(R"({{"ph":"M","name":"thread_name","pid":{},"tid":{},"args":{{"name":"{}"}}}})", rank, track, escaped(name)));
}

void TraceEvents::add(const TraceSpan& span) {
  add(fmt::format(R"({{"ph":"X","name":"{}","cat":"{}","pid":{},"tid":{},"ts":{:.3f},"dur":{:.3f},"args":{}}})",
                  escaped(span.name), span.category, span.rank, span.track, span.begin_us, span.us, span.arguments));
}

void TraceEvents::add(std::string_view object) {
  if (!text_.empty()) text_ += ",\n";
  text_ += object;
}

std::string trace_file(const std::vector<std::string>& texts) {
  std::string events;
  for (const std::string& text : texts) events += fmt::format("{}{}", events.empty() || text.empty() ? "" : ",\n", text);
  return fmt::format(R"({{"displayTimeUnit":"ns","traceEvents":[{}]}})", events);
}

}  // namespace dattn
