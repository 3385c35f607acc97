// What the ranks of a job must have in common before they compute.
#include "launch/devices.h"

#include <atomic>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/comm/thread.h"

namespace dattn {
namespace {

using testing::AllOf;
using testing::HasSubstr;

TEST(Devices, RanksOfDifferentReleasesAreRefusedOnAllOfThem) {
  std::atomic<int> refused{0};
  try {
    run_thread_ranks(3, {}, [&](Communicator& threads) {
      DeviceOptions options;
      if (threads.rank() == 2) options.version = "0.0.9";
      try {
        device_world(whole_group(threads), options, 60);
      } catch (const Error& error) {
        EXPECT_THAT(  // of the rank's own finding, or of the rank that was first to end the job with it
            error.what(), AllOf(HasSubstr("rank 2 on "), HasSubstr("runs dattn 0.0.9"), HasSubstr(DATTN_VERSION),
                                HasSubstr("install one version on all hosts")));
        ++refused;
        throw;
      }
    });
    FAIL() << "the ranks went on";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
  }
  EXPECT_EQ(refused, 3);
}

TEST(Devices, RanksOfOneReleaseAreNot) {
  run_thread_ranks(2, {}, [](Communicator& threads) { EXPECT_EQ(device_world(whole_group(threads), {}, 60)->size(), 2); });
}

}  // namespace
}  // namespace dattn
