#include "parallel/comm/decorators.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "parallel/comm/thread.h"

namespace dattn::test {
namespace {

TEST(Trace, IsOneJsonArrayOfEvents) {
  std::string events;
  run_thread_ranks(2, {.timeout_s = 60}, [&](Communicator& world) {
    const auto trace = std::make_shared<Trace>(world.rank());
    const int both[] = {0, 1};
    const auto group = traced(world.split(both, "ring"), trace);
    const auto part = group->split(both, "inner");
    group->barrier({.verb = "barrier", .step = 3});
    part->barrier({.verb = "\"quoted\""});
    trace->span(Trace::kWork, "attend", 1.0, 2.5, R"({"flops":12})");
    if (world.rank() == 0) events = trace->json_events();
  });
  const auto json = nlohmann::json::parse("[" + events + "]");
  int spans = 0, rings = 0;
  for (const auto& event : json) {
    EXPECT_EQ(event["pid"], 0);
    if (event["ph"] == "M" && event["args"]["name"] == "comm ring") ++rings;
    if (event["ph"] != "X") continue;
    ++spans;
    EXPECT_GE(event["dur"].get<double>(), 0.0);
    const auto& arguments = event["args"];
    if (event["name"] == "barrier") {
      EXPECT_EQ(arguments["step"], 3);
    }
    EXPECT_EQ(event["cat"], event["name"] == "attend" ? "work" : "communication");
    if (event["name"] == "attend") {
      EXPECT_EQ(arguments["flops"], 12);
    }
  }
  EXPECT_EQ(spans, 5);
  EXPECT_EQ(rings, 1);
}

TEST(ByteCounter, LeavesOutWhatGoesToOneself) {
  const auto counter = std::make_shared<ByteCounter>();
  const auto group = counted(self_communicator(), counter);
  int in = 0;
  const int out = 5;
  const SendPart send{0, &out, sizeof out};
  const RecvPart receive{0, &in, sizeof in};
  group->exchange({&send, 1}, {&receive, 1}, {.verb = "gather"});
  EXPECT_EQ(in, 5);
  EXPECT_EQ(counter->total().received, 0);
  EXPECT_EQ(counter->by_verb().at("gather").operations, 1);
  counter->count("gather", 10, 20);
  counter->count("rotate", 1, 2);
  EXPECT_EQ(counter->total().received, 11);
  EXPECT_EQ(counter->total().sent, 22);
  counter->reset();
  EXPECT_EQ(counter->total().operations, 0);
}

}  // namespace
}  // namespace dattn::test
