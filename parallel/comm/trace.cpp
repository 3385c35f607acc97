#include "parallel/comm/trace.h"

#include <fmt/format.h>

namespace dattn {

Trace::Trace(int rank) : rank_(rank), start_(std::chrono::steady_clock::now()), tracks_{{std::string(kWork), 0}} {
  events_.name_rank(rank);
  events_.name_track(rank, 0, kWork);
}

void Trace::span(std::string_view track, std::string_view name, double begin_us, double end_us, std::string_view arguments) {
  const std::lock_guard lock(mutex_);
  auto known = tracks_.find(track);
  if (known == tracks_.end()) {
    known = tracks_.emplace(track, static_cast<int>(tracks_.size())).first;
    events_.name_track(rank_, known->second, track);
  }
  events_.add({.rank = rank_,
               .track = known->second,
               .name = name,
               .category = track == kWork ? "work" : "communication",
               .begin_us = begin_us,
               .us = end_us - begin_us,
               .arguments = arguments});
}

double Trace::now_us() const {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start_).count();
}

std::string Trace::json_events() const {
  const std::lock_guard lock(mutex_);
  return events_.text();
}

WorkSpan::~WorkSpan() {
  if (trace_ == nullptr) return;
  const std::string name = what_.empty() ? std::string(label_.verb) : fmt::format("{} {}", what_, label_.verb);
  trace_->span(Trace::kWork, name, begin_us_, trace_->now_us(),
               fmt::format(R"({{"layer":{},"step":{}}})", label_.layer, label_.step));
}

}  // namespace dattn
