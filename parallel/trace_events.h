// Chrome trace events, which Perfetto reads (ui.perfetto.dev, chrome://tracing): a process for every rank, a thread for every
// track of it, times in microseconds. Simulations (timeline.h) and real runs (comm/decorators.h) are written alike, so that
// they can be laid side by side.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dattn {

struct TraceSpan {
  int rank = 0;
  int track = 0;
  std::string_view name, category;
  double begin_us = 0;
  double us = 0;
  std::string_view arguments = "{}";  // a JSON object
};

class TraceEvents {
 public:
  void name_rank(int rank);
  void name_track(int rank, int track, std::string_view name);
  void add(const TraceSpan& span);
  const std::string& text() const { return text_; }  // JSON objects with commas between them

 private:
  void add(std::string_view object);
  std::string text_;
};

// A file of the events of several texts.
std::string trace_file(const std::vector<std::string>& texts);

}  // namespace dattn
