#include "parallel/comm/thread.h"

#include <atomic>
#include <chrono>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/threads.h"
#include "parallel/comm/decorators.h"
#include "tests/parallel/comm/cases.h"

namespace dattn::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using testing::AllOf;
using testing::HasSubstr;

class Collectives : public testing::TestWithParam<std::tuple<std::size_t, int>> {};

TEST_P(Collectives, OnThreadRanks) {
  const auto& [index, ranks] = GetParam();
  run_thread_ranks(ranks, {.timeout_s = 60}, collective_cases()[index].run);
}

INSTANTIATE_TEST_SUITE_P(ThreadRanks, Collectives,
                         testing::Combine(testing::Range(std::size_t{0}, collective_cases().size()), testing::Range(1, 9)),
                         [](const auto& param) {
                           return collective_cases()[std::get<0>(param.param)].name + std::to_string(std::get<1>(param.param));
                         });

TEST(ThreadJob, WaitingRanksSleep) { run_thread_ranks(8, {.timeout_s = 60}, waiting_ranks_sleep); }

TEST(SelfCommunicator, RunsEveryCase) {
  for (const Case& one : collective_cases()) EXPECT_NO_THROW(one.run(*self_communicator())) << one.name;
}

// Runs a job that must fail; returns its error and how long it took.
struct Outcome {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
  double seconds = 0;
};
Outcome failure_of(int ranks, double timeout_s, const std::function<void(Communicator&)>& body) {
  const auto begin = steady_clock::now();
  Outcome outcome;
  try {
    run_thread_ranks(ranks, {timeout_s}, body);
    ADD_FAILURE() << "the job ended without an error";
  } catch (const Error& error) {
    outcome.code = error.code();
    outcome.message = error.what();
  }
  outcome.seconds = std::chrono::duration<double>(steady_clock::now() - begin).count();
  return outcome;
}

std::unique_ptr<Communicator> whole(Communicator& world, std::string_view name) {
  std::vector<int> all;
  for (int r = 0; r < world.size(); ++r) all.push_back(r);
  return world.split(all, name);
}

TEST(ThreadJob, ErrorOfOneRankEndsAllWithItsReason) {
  std::atomic<int> told{0};
  const Outcome outcome = failure_of(4, 60, [&](Communicator& world) {
    require(world.rank() != 2, "key lr: -1 is not positive");
    try {
      world.barrier({.verb = "barrier"});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeer);
      EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 2 ended the job"), HasSubstr("key lr: -1 is not positive")));
      ++told;
      throw;
    }
  });
  EXPECT_EQ(outcome.code, ErrorCode::kBadInput);
  EXPECT_EQ(outcome.message, "key lr: -1 is not positive [rank 2/4]");
  EXPECT_EQ(told, 3);
  EXPECT_LT(outcome.seconds, 5);
}

TEST(ThreadJob, DeadlockEndsWithinTheDeadline) {
  const Outcome outcome = failure_of(3, 0.5, [](Communicator& world) {
    int value = 0;
    const RecvPart receive{(world.rank() + 1) % 3, &value, sizeof value};
    world.exchange({}, {&receive, 1}, {.verb = "rotate", .layer = 4, .step = 2});
  });
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message,
              AllOf(HasSubstr("rotate, layer 4, step 2"), HasSubstr("'world'"), HasSubstr("4 bytes"), HasSubstr("waits too")));
  EXPECT_GE(outcome.seconds, 0.5);
  EXPECT_LT(outcome.seconds, 2.5);
}

TEST(ThreadJob, LateRankIsNoErrorHoweverLongTheChainBehindIt) {
  run_thread_ranks(6, {.timeout_s = 0.3}, [](Communicator& world) {
    if (world.rank() == 5) std::this_thread::sleep_for(milliseconds(1500));
    int token = 5;
    const RecvPart receive{world.rank() + 1, &token, sizeof token};
    if (world.rank() < 5) world.exchange({}, {&receive, 1}, {.verb = "rotate"});
    const SendPart send{world.rank() - 1, &token, sizeof token};
    if (world.rank() > 0) world.exchange({&send, 1}, {}, {.verb = "rotate"});
    EXPECT_EQ(token, 5);
  });
}

TEST(ThreadJob, RankThatReturnedEarlyIsNotWaitedFor) {
  const Outcome outcome = failure_of(2, 60, [](Communicator& world) {
    if (world.rank() == 0) world.barrier({.verb = "barrier"});
  });
  EXPECT_THAT(outcome.message, HasSubstr("rank 1 has already ended its work"));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(ThreadJob, SizesThatDifferNameBothSides) {
  const Outcome outcome = failure_of(2, 60, [](Communicator& world) {
    std::vector<char> data(100);
    const SendPart send{1, data.data(), 96};
    const RecvPart receive{0, data.data(), 64};
    if (world.rank() == 0) world.exchange({&send, 1}, {}, {.verb = "gather", .layer = 1});
    if (world.rank() == 1) world.exchange({}, {&receive, 1}, {.verb = "rotate", .layer = 2});
  });
  EXPECT_EQ(outcome.code, ErrorCode::kInternal);
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("awaits 64 bytes"), HasSubstr("sent 96 bytes"), HasSubstr("gather, layer 1"),
                                     HasSubstr("rotate, layer 2")));
}

TEST(ThreadJob, AbortReachesEveryGroup) {
  std::atomic<int> told{0};
  run_thread_ranks(4, {.timeout_s = 60}, [&](Communicator& world) {
    const auto group = whole(world, "axis");
    if (world.rank() == 3) return world.abort("enough");
    try {
      group->barrier({.verb = "barrier"});
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("enough"));
      EXPECT_EQ(world.job_end().rank, 3);
      EXPECT_THROW(world.barrier({.verb = "later"}), Error);
      ++told;
    }
  });
  EXPECT_EQ(told, 3);
}

// Who ended a job says why, also where the rank only hears of it later: a thread that watches its device was first.
TEST(ThreadJob, TheCodeOfAnAbortIsTheJobs) {
  try {
    run_thread_ranks(2, {.timeout_s = 60}, [&](Communicator& world) {
      if (world.rank() == 1) world.abort("the device is lost", ErrorCode::kSystem);
      world.barrier({.verb = "barrier"});
    });
    FAIL() << "the job did not end";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kSystem);
    EXPECT_THAT(error.what(), HasSubstr("the device is lost"));
  }
}

TEST(ThreadJob, EachRankHasItsContextAndThreads) {
  run_thread_ranks(2, {.timeout_s = 60}, [](Communicator& world) {
    EXPECT_EQ(error_context(), "rank " + std::to_string(world.rank()) + "/2");
    EXPECT_EQ(num_threads(), std::max(1, available_cores() / 2));
  });
}

TEST(ThreadJob, PartsThatMakeNoSenseAreRefused) {
  run_thread_ranks(2, {.timeout_s = 60}, [](Communicator& world) {
    int a = 0, b = 0;
    const SendPart twice[] = {{0, &a, 4}, {0, &b, 4}};
    EXPECT_THROW(world.exchange(twice, {}, {}), Error);
    const SendPart nobody{2, &a, 4};
    EXPECT_THROW(world.exchange({&nobody, 1}, {}, {}), Error);
    const SendPart self{world.rank(), &a, 4};
    EXPECT_THROW(world.exchange({&self, 1}, {}, {}), Error);
    EXPECT_THROW(world.wait(12345), Error);
    const int backwards[] = {1, 0};
    EXPECT_THROW(world.split(backwards, "x"), Error);
  });
}

// The whole world, faulty on one rank.
Outcome with_fault(const Fault& fault, double timeout_s) {
  return failure_of(3, timeout_s, [&](Communicator& world) {
    auto group = whole(world, "axis");
    if (world.rank() == 1) group = faulty(std::move(group), fault);
    const auto part = whole(*group, "part");  // split keeps the fault
    for (int step = 0; step < 6; ++step) {
      Tensor data(DType::kF32, Shape{3000});
      part->all_reduce_sum(data, {.verb = "all_reduce", .step = step});
    }
  });
}

TEST(Faults, DroppedSendEndsWithinTheDeadline) {
  const Outcome outcome = with_fault({.kind = Fault::Kind::kDrop, .at = 4}, 0.5);
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message, HasSubstr("all_reduce"));
  EXPECT_LT(outcome.seconds, 2.5);
}

TEST(Faults, KilledRankEndsAllAtOnce) {
  const Outcome outcome = with_fault({.kind = Fault::Kind::kKill, .at = 3}, 60);
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("killed by an injected fault at start 3"), HasSubstr("[rank 1/3]")));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(Faults, DelayLongerThanTheDeadlineIsNoError) {
  run_thread_ranks(2, {.timeout_s = 0.3}, [](Communicator& world) {
    const auto group = faulty(whole(world, "axis"), {.kind = Fault::Kind::kDelay, .at = 0, .delay_s = 0.8});
    if (world.rank() == 0) group->barrier({.verb = "barrier"});
    if (world.rank() == 1) whole(world, "axis")->barrier({.verb = "barrier"});
  });
}

}  // namespace
}  // namespace dattn::test
