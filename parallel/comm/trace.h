// What a rank did in a real run, and when: spans of work and of communication, as events of trace_events.h. traced()
// (decorators.h) notes transfers and waits; whoever works between them finds the trace at its communicator.
#pragma once

#include <chrono>
#include <map>
#include <mutex>
#include <string>

#include "parallel/comm/communicator.h"
#include "parallel/trace_events.h"

namespace dattn {

class Trace {
 public:
  explicit Trace(int rank);  // times are counted from here on: ranks make theirs after a barrier
  void span(std::string_view track, std::string_view name, double begin_us, double end_us,
            std::string_view arguments_json = "{}");
  double now_us() const;
  std::string json_events() const;  // comma-separated objects, without the enclosing brackets

  static constexpr std::string_view kWork = "work";  // the track of what this rank computes and copies

 private:
  mutable std::mutex mutex_;
  int rank_;
  std::chrono::steady_clock::time_point start_;
  TraceEvents events_;
  std::map<std::string, int, std::less<>> tracks_;
};

// A span of the track `work` from its making to its end, named "WHAT VERB"; none without a trace. Work of a device counts for
// as long as the host takes to hand it over.
class WorkSpan {
 public:
  WorkSpan(Trace* trace, const OpLabel& label, std::string_view what = {})
      : trace_(trace), label_(label), what_(what), begin_us_(trace != nullptr ? trace->now_us() : 0) {}
  ~WorkSpan();
  WorkSpan(const WorkSpan&) = delete;
  WorkSpan& operator=(const WorkSpan&) = delete;

 private:
  Trace* trace_;
  OpLabel label_;
  std::string_view what_;
  double begin_us_;
};

}  // namespace dattn
