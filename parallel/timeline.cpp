#include "parallel/timeline.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "parallel/timeline_page.h"
#include "parallel/trace_events.h"

namespace dattn {
namespace {

using Json = nlohmann::ordered_json;

// "kv2 = rotate(kv1)" of every step.
std::vector<std::string> step_texts(const Plan& plan) {
  std::vector<std::string> names(plan.values.size());
  std::map<What, int> count;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const What what = plan.values[i].what;
    const int number = count[what]++;
    names[i] = number == 0 ? std::string(name_of(what)) : fmt::format("{}{}", name_of(what), number);
  }
  const auto joined = [&](const std::vector<ValueId>& values) {
    std::string text;
    for (const ValueId value : values) {
      text += fmt::format("{}{}", text.empty() ? "" : ", ", value == kNoValue ? "-" : names[static_cast<std::size_t>(value)]);
    }
    return text;
  };
  std::vector<std::string> texts;
  for (const Step& step : plan.steps)
    texts.push_back(fmt::format("{} = {}({})", joined(step.out), name_of(step.verb), joined(step.in)));
  return texts;
}

double microseconds(double seconds) { return std::round(seconds * 1e9) * 1e-3; }

// Calls visit(phase number, phase, its start in seconds).
template <class Visit>
void for_each_phase(const std::vector<Phase>& phases, const Visit& visit) {
  double start_s = 0;
  for (std::size_t i = 0; i < phases.size(); ++i) {
    visit(i, phases[i], start_s);
    start_s += phases[i].simulation->time_s;
  }
}

int timeline_ranks(const std::vector<Phase>& phases) {
  int ranks = 0;
  for (const Phase& phase : phases) {
    for (const Span& span : phase.simulation->spans) ranks = std::max(ranks, span.rank + 1);
  }
  return ranks;
}

int track_of(Span::Kind kind) { return kind == Span::Kind::kInside ? 1 : kind == Span::Kind::kBetween ? 2 : 0; }

void add_span(TraceEvents& events, const Span& span, const Phase& phase, double start_s, const std::string& text) {
  const std::string_view verb = name_of(phase.plan->steps[span.step].verb);
  const bool message = span.peer >= 0;
  Json arguments{{"phase", phase.name}, {"step", span.step}, {"does", text}};
  if (message) arguments["from"] = span.peer;
  if (message) arguments["bytes"] = span.bytes;
  events.add({.rank = span.rank,
              .track = track_of(span.kind),
              .name = span.kind == Span::Kind::kCopy ? fmt::format("copy of {}", verb) : std::string(verb),
              .category = message ? "communication" : "work",
              .begin_us = microseconds(start_s + span.begin_s),
              .us = microseconds(span.seconds),
              .arguments = arguments.dump()});
}

// "</script>" inside the data would end the script; JSON may write '/' as it likes.
std::string in_script(const Json& data) {
  std::string text = data.dump();
  for (std::size_t at = 0; (at = text.find("</", at)) != std::string::npos; at += 3) text.replace(at, 2, "<\\/");
  return text;
}

std::string in_html(const std::string& text) {
  std::string escaped;
  for (const char c : text) escaped += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return escaped;
}

void fill(std::string& page, std::string_view place, const std::string& text) {
  for (std::size_t at = 0; (at = page.find(place, at)) != std::string::npos; at += text.size())
    page.replace(at, place.size(), text);
}

}  // namespace

std::string timeline_json(const std::vector<Phase>& phases) {
  TraceEvents events;
  for (int rank = 0; rank < timeline_ranks(phases); ++rank) {
    events.name_rank(rank);
    events.name_track(rank, 0, "work");
    events.name_track(rank, 1, "from this node");
    events.name_track(rank, 2, "from other nodes");
  }
  for_each_phase(phases, [&](std::size_t, const Phase& phase, double start_s) {
    const std::vector<std::string> texts = step_texts(*phase.plan);
    for (const Span& span : phase.simulation->spans) add_span(events, span, phase, start_s, texts[span.step]);
  });
  return trace_file({events.text()});
}

std::string timeline_html(const std::string& title, const std::vector<Phase>& phases) {
  Json data{{"ranks", timeline_ranks(phases)}, {"phases", Json::array()}, {"spans", Json::array()}};
  for_each_phase(phases, [&](std::size_t number, const Phase& phase, double start_s) {
    Json verbs = Json::array();
    for (const Step& step : phase.plan->steps) verbs.push_back(name_of(step.verb));
    Json axes = Json::array();
    for (const AxisUse& use : phase.simulation->axes())
      axes.push_back({name_of(use.axis), use.bytes, use.busiest_s / phase.simulation->time_s});
    data["phases"].push_back({{"name", phase.name},
                              {"begin", microseconds(start_s)},
                              {"end", microseconds(start_s + phase.simulation->time_s)},
                              {"verbs", std::move(verbs)},
                              {"steps", step_texts(*phase.plan)},
                              {"axes", std::move(axes)}});
    for (const Span& span : phase.simulation->spans) {
      data["spans"].push_back({span.rank, static_cast<int>(span.kind), number, span.step, microseconds(start_s + span.begin_s),
                               microseconds(span.seconds), span.bytes, span.peer});
    }
  });
  std::string page = kTimelinePage;
  fill(page, "__TITLE__", in_html(title));
  fill(page, "__DATA__", in_script(data));
  return page;
}

}  // namespace dattn
