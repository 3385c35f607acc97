// Timelines: the trace parses and shows every span once, the page needs nothing from elsewhere.
#include "parallel/timeline.h"

#include <map>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/parallel/small_machine.h"

namespace dattn {
namespace {

struct Simulated {
  Plan forward = plan_of("hybrid", mesh_of(4, 2), 64, Mask::causal());
  Plan gradient = backward(forward);
  Simulation forth, back;
  std::vector<Phase> phases;

  explicit Simulated(int timeline_ranks) {
    Machine machine = free_machine(4);
    machine.flops.fp32 = 1e9;
    machine.memory_bandwidth = 1e9;
    machine.links.inside = {1e-6, 1e8, std::nullopt};
    machine.links.between = Link{5e-6, 1e8, 2e8};
    forth = simulate(forward, machine, timeline_ranks);
    back = simulate(gradient, machine, timeline_ranks);
    phases = {{"forward", &forward, &forth}, {"backward", &gradient, &back}};
  }
};

TEST(Timeline, SpansAreWhatTheRanksDo) {
  const Simulated simulated(8);
  std::map<int, double> work;
  std::map<int, std::int64_t> bytes;
  for (const Span& span : simulated.forth.spans) {
    if (span.peer < 0) work[span.rank] += span.seconds;
    bytes[span.rank] += span.bytes;
  }
  for (int rank = 0; rank < 8; ++rank) {
    const RankTimes& times = simulated.forth.ranks[static_cast<std::size_t>(rank)];
    EXPECT_NEAR(work[rank], times.compute_s, 1e-9);
    EXPECT_EQ(bytes[rank], times.bytes_inside + times.bytes_between);
  }
}

TEST(Timeline, TheTraceShowsEverySpanOnce) {
  const Simulated simulated(8);
  const auto trace = nlohmann::json::parse(timeline_json(simulated.phases));
  std::size_t spans = 0, names = 0;
  std::map<std::pair<int, int>, std::vector<std::pair<double, double>>> tracks;
  for (const auto& event : trace["traceEvents"]) {
    if (event["ph"] == "M") {
      ++names;
      continue;
    }
    ++spans;
    EXPECT_GE(event["ts"].get<double>(), event["args"]["phase"] == "forward" ? 0 : simulated.forth.time_s * 1e6 - 1e-3);
    tracks[{event["pid"], event["tid"]}].push_back({event["ts"], event["ts"].get<double>() + event["dur"].get<double>()});
  }
  EXPECT_EQ(names, 8U * 4);
  EXPECT_EQ(spans, simulated.forth.spans.size() + simulated.back.spans.size());
  for (auto& [track, times] : tracks) {  // Perfetto draws no two spans of a track side by side
    std::sort(times.begin(), times.end());
    for (std::size_t i = 1; i < times.size(); ++i) EXPECT_LE(times[i - 1].second, times[i].first + 2e-3);
  }
}

TEST(Timeline, OnlyTheRanksAskedFor) {
  const Simulated simulated(3);
  for (const Span& span : simulated.back.spans) EXPECT_LT(span.rank, 3);
  EXPECT_NE(timeline_json(simulated.phases).find("rank 2"), std::string::npos);
  EXPECT_EQ(timeline_json(simulated.phases).find("rank 3"), std::string::npos);
  EXPECT_TRUE(Simulated(0).forth.spans.empty());
}

TEST(Timeline, ThePageStandsAlone) {
  const Simulated simulated(8);
  const std::string page = timeline_html("a <b> & c", simulated.phases);
  for (const char* elsewhere : {"http:", "https:", "src=", "href=", "url(", "@import"})
    EXPECT_EQ(page.find(elsewhere), std::string::npos) << elsewhere;
  EXPECT_NE(page.find("<h1>a &lt;b&gt; &amp; c</h1>"), std::string::npos);
  const std::string begin = "const data = ";
  const std::size_t from = page.find(begin) + begin.size();
  const auto data = nlohmann::json::parse(page.substr(from, page.find(";\n", from) - from));
  EXPECT_EQ(data["ranks"], 8);
  EXPECT_EQ(data["spans"].size(), simulated.forth.spans.size() + simulated.back.spans.size());
  EXPECT_EQ(data["phases"][1]["steps"].size(), simulated.gradient.steps.size());
  EXPECT_EQ(data["phases"][0]["axes"].size(), 2U);
  EXPECT_EQ(data["phases"][0]["axes"][0][0], "ring");
  EXPECT_DOUBLE_EQ(data["phases"][1]["axes"][1][1], simulated.back.axes()[1].bytes);
  const Step& first = simulated.forward.steps[0];
  EXPECT_EQ(data["phases"][0]["verbs"][0], name_of(first.verb));
}

}  // namespace
}  // namespace dattn
