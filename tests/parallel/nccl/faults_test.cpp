// Whatever fails in or around NCCL ends all ranks, in time, with one message: faults are injected by the stand-in.
#include <atomic>
#include <chrono>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/device/stream.h"
#include "tests/parallel/nccl/job.h"

namespace dattn::test {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

// Steps of a ring on all ranks, then the host waits for the device.
void turn(Communicator& world, int steps = 4) {
  const int next = (world.rank() + 1) % world.size(), previous = (world.rank() + world.size() - 1) % world.size();
  const Tensor out(DType::kF32, Shape{50000}), in(DType::kF32, Shape{50000});
  for (int step = 0; step < steps; ++step) {
    const SendPart send{next, out->data, 200000, out->device};
    const RecvPart receive{previous, in->data, 200000, in->device};
    world.exchange({&send, 1}, {&receive, 1}, {.verb = "rotate", .layer = 3, .step = step});
  }
  current_stream().synchronize();
}

Outcome with_fault(const std::string& fault, const NcclOptions& options) {
  const Environment injected("DATTN_NCCL_FAULT", fault);
  return failure_of([&] { run_nccl_ranks(3, options, [](Communicator& world) { turn(world); }); });
}

TEST(NcclFaults, LostMessageEndsWithinTheDeadline) {
  const Outcome outcome = with_fault("drop 1 2", {.timeout_s = 0.7});
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("has not ended for 0.7 s"), HasSubstr("200000 bytes"), HasSubstr("'world' of 3"),
                                     HasSubstr("rotate, layer 3, step"), HasSubstr("DATTN_COMM_CHECK=1")));
  EXPECT_GE(outcome.seconds, 0.7);
  EXPECT_LT(outcome.seconds, 3);
}

TEST(NcclFaults, ErrorThatNcclReportsEndsAllAtOnce) {
  const Outcome outcome = with_fault("async 2 1", {.timeout_s = 60});
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message,
              AllOf(HasSubstr("rank 2"), HasSubstr("remote process exited"), HasSubstr("the connection was lost")));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(NcclFaults, FailedInitialisationIsTold) {
  const Outcome outcome = with_fault("init 1 2", {.timeout_s = 60});
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("rank 1 in group 'world' of 3 (join)"), HasSubstr("unhandled system error")));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(NcclFaults, RankThatNeverJoinsEndsWithinTheDeadline) {
  const Outcome outcome = with_fault("absent 2", {.timeout_s = 0.7});
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message,
              AllOf(HasSubstr("did not connect the ranks of a group within 0.7 s"), HasSubstr("'world' of 3")));
  EXPECT_LT(outcome.seconds, 3);
}

TEST(NcclFaults, DeviceThatNeverComesToRestIsTold) {
  const Environment injected("DATTN_NCCL_FAULT", "hang 1 1 2.5");
  std::atomic<int> told{0};
  NcclOptions options{.timeout_s = 0.5, .drain_s = 0.3};
  options.stuck = [&](const JobEnd& end) {
    ++told;
    EXPECT_EQ(end.code, ErrorCode::kPeer);
    EXPECT_THAT(end.reason, HasSubstr("has not ended for 0.5 s"));
  };
  const Outcome outcome = failure_of([&] { run_nccl_ranks(3, options, [](Communicator& world) { turn(world); }); });
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_GE(told, 1);  // the rank whose stream is held up; others' run empty
}

TEST(NcclFaults, DelayWithinTheDeadlineIsNoFault) {
  const Environment injected("DATTN_NCCL_FAULT", "delay 1 1 0.4");
  run_nccl_ranks(3, {.timeout_s = 5}, [](Communicator& world) { turn(world); });
}

TEST(NcclFaults, ErrorOfOneRankReachesHostsThatWaitForTheirDevice) {
  std::atomic<int> told{0};
  const Outcome outcome = failure_of([&] {
    run_nccl_ranks(3, {.timeout_s = 60}, [&](Communicator& world) {
      turn(world);
      if (world.rank() == 1) {
        std::this_thread::sleep_for(milliseconds(300));
        fail(ErrorCode::kSystem, "checkpoint.tmp: no space left on device");
      }
      try {
        turn(world);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kPeer);
        EXPECT_THAT(error.what(), HasSubstr("rank 1"));
        ++told;
        throw;
      }
    });
  });
  EXPECT_EQ(told, 2);
  EXPECT_LT(outcome.seconds, 5);
}

void send_only(Communicator& world, std::size_t bytes, const OpLabel& label) {
  const Tensor data(DType::kF32, Shape{64});
  const SendPart part{1 - world.rank(), data->data, bytes, data->device};
  world.exchange({&part, 1}, {}, label);
  current_stream().synchronize();
}
void receive_only(Communicator& world, std::size_t bytes, const OpLabel& label) {
  const Tensor data(DType::kF32, Shape{64});
  const RecvPart part{1 - world.rank(), data->data, bytes, data->device};
  world.exchange({}, {&part, 1}, label);
  current_stream().synchronize();
}

TEST(NcclFaults, CallsThatDoNotMatchAreNamedWhenChecked) {
  const Outcome outcome = failure_of([] {
    run_nccl_ranks(2, {.timeout_s = 60, .check_calls = true}, [](Communicator& world) {
      if (world.rank() == 0) return send_only(world, 64, {.verb = "gather", .layer = 1});
      receive_only(world, 64, {.verb = "rotate", .layer = 2, .step = 5});
    });
  });
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("rank 1 awaits 64 bytes (rotate, layer 2, step 5)"),
                                     HasSubstr("rank 0 sends 64 bytes (gather, layer 1)")));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(NcclFaults, SizesThatDifferEndAllAtOnceWhereNcclSeesThem) {
  const Outcome outcome = failure_of([] {
    run_nccl_ranks(2, {.timeout_s = 60}, [](Communicator& world) {
      if (world.rank() == 0) return send_only(world, 96, {.verb = "rotate"});
      receive_only(world, 64, {.verb = "rotate"});
    });
  });
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("NCCL reports 'invalid usage'"), HasSubstr("of 64"), HasSubstr("of 96")));
  EXPECT_LT(outcome.seconds, 5);
}

TEST(NcclFaults, DeadlockOnDevicesEndsWithinTheDeadline) {
  const Outcome outcome = failure_of([] {
    run_nccl_ranks(2, {.timeout_s = 0.7}, [](Communicator& world) { receive_only(world, 8, {.verb = "rotate", .step = 9}); });
  });
  EXPECT_EQ(outcome.code, ErrorCode::kPeer);
  EXPECT_THAT(outcome.message, AllOf(HasSubstr("awaits 8 bytes from rank"), HasSubstr("rotate, step 9")));
  EXPECT_LT(outcome.seconds, 3);
}

TEST(NcclFaults, TransferOfOneSideEndsWithinTheDeadline) {
  const Outcome outcome = failure_of([] {
    run_nccl_ranks(2, {.timeout_s = 0.7}, [](Communicator& world) {
      turn(world);
      const Tensor data(DType::kF32, Shape{64});
      const RecvPart part{0, data->data, 256, data->device};
      if (world.rank() == 1) world.exchange({}, {&part, 1}, {.verb = "forgotten"});
      world.barrier({.verb = "barrier"});
      if (world.rank() == 1) std::this_thread::sleep_for(milliseconds(1500));
      world.barrier({.verb = "barrier"});
    });
  });
  EXPECT_THAT(outcome.message, HasSubstr("forgotten"));
}

}  // namespace
}  // namespace dattn::test
