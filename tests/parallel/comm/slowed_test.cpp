#include "parallel/comm/slowed.h"

#include <chrono>
#include <numeric>
#include <thread>

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/comm/decorators.h"
#include "parallel/comm/thread.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

std::unique_ptr<Communicator> whole(Communicator& world) {
  std::vector<int> all(static_cast<std::size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  return world.split(all, "whole");
}

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Times are slept, so they are never short; a busy machine may make them long, for which the bounds above leave room.
TEST(Slowed, StartReturnsAndWaitTakesTheLinksTime) {
  run_thread_ranks(2, {}, [](Communicator& world) {
    const auto group = slowed(whole(world), {.latency_s = 0.05, .bandwidth = 1e5});  // 10 kB take 0.1 s
    std::vector<std::byte> out(10000, std::byte(world.rank() + 1)), in(10000);
    const SendPart send{1 - world.rank(), out.data(), out.size()};
    const RecvPart receive{1 - world.rank(), in.data(), in.size()};
    world.barrier({});
    const auto begin = Clock::now();
    const auto ticket = group->start({&send, 1}, {&receive, 1}, {});
    EXPECT_LT(seconds_since(begin), 0.1);
    group->wait(ticket);
    EXPECT_GE(seconds_since(begin), 0.149);
    EXPECT_LT(seconds_since(begin), 0.6);
    EXPECT_EQ(in[9999], std::byte(2 - world.rank()));
  });
}

// What a rank sends to both others shares its way out, over all groups; so does what it receives.
TEST(Slowed, MessagesShareTheWays) {
  run_thread_ranks(3, {}, [](Communicator& world) {
    const auto group = slowed(whole(world), {.latency_s = 0, .bandwidth = 1e5});
    const int all[] = {0, 1, 2};
    const auto part = group->split(all, "part");
    std::vector<std::byte> out(5000), in[2];
    const auto exchange = [&](Communicator& on) {
      std::vector<SendPart> sends;
      std::vector<RecvPart> receives;
      for (int peer = 0; peer < 3; ++peer) {
        if (peer == world.rank()) continue;
        sends.push_back({peer, out.data(), out.size()});
        in[receives.size()].resize(5000);
        receives.push_back({peer, in[receives.size()].data(), 5000});
      }
      return on.start(sends, receives, {});
    };
    world.barrier({});
    const auto begin = Clock::now();
    const auto first = exchange(*group);
    group->wait(first);
    EXPECT_GE(seconds_since(begin), 0.099);
    const auto second = exchange(*group), third = exchange(*part);
    group->wait(second);
    part->wait(third);
    EXPECT_GE(seconds_since(begin), 0.299);
  });
}

// A receiver that is late starts the message; the sender's time counts where that one is late.
TEST(Slowed, AMessageBeginsWhenBothSidesHaveStarted) {
  run_thread_ranks(2, {}, [](Communicator& world) {
    const auto group = slowed(whole(world), {.latency_s = 0, .bandwidth = 1e5});
    std::vector<std::byte> memory(10000);
    for (const int late : {0, 1}) {
      const auto met = Clock::now();
      world.barrier({});
      if (world.rank() == late) std::this_thread::sleep_for(std::chrono::milliseconds(100));
      const auto begin = Clock::now();
      const SendPart send{1, memory.data(), memory.size()};
      const RecvPart receive{0, memory.data(), memory.size()};
      if (world.rank() == 0) group->exchange({&send, 1}, {}, {});
      if (world.rank() == 1) group->exchange({}, {&receive, 1}, {});
      if (world.rank() == 1) {
        EXPECT_GE(late == 0 ? seconds_since(met) : seconds_since(begin), late == 0 ? 0.199 : 0.099);
      }
    }
  });
}

TEST(Slowed, StampsAreNotCounted) {
  run_thread_ranks(2, {}, [](Communicator& world) {
    const auto counter = std::make_shared<ByteCounter>();
    const auto group = counted(slowed(whole(world), {.latency_s = 0, .bandwidth = 1e9}), counter);
    Tensor sum(DType::kF32, {8});
    group->all_reduce_sum(sum, {"all_reduce"});
    EXPECT_EQ(counter->total().received, 8 * 4);
  });
}

TEST(Slowed, RefusesLinksThatCarryNothing) {
  run_thread_ranks(1, {}, [](Communicator& world) {
    EXPECT_THROW(slowed(whole(world), {.latency_s = 0, .bandwidth = 0}), Error);
    EXPECT_THROW(slowed(whole(world), {.latency_s = -1, .bandwidth = 1}), Error);
  });
}

}  // namespace
}  // namespace dattn
