// The stand-in of NCCL on its own: host pointers, no stream, so every call is done at its return.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "parallel/comm/nccl_api.h"
#include "tests/parallel/nccl/job.h"

namespace dattn::nccl {
namespace {

using test::Environment;
using testing::AllOf;
using testing::HasSubstr;

Api api() {
  std::string report;
  const auto found = find_nccl(report);
  EXPECT_TRUE(found) << report;
  return found.value();
}

void on_ranks(int ranks, const std::function<void(const Api&, Comm, int)>& body) {
  const Api nccl = api();
  UniqueId id{};
  ASSERT_EQ(nccl.get_unique_id(&id), kSuccess);
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      Comm comm = nullptr;
      Config config;
      EXPECT_EQ(nccl.comm_init_rank_config(&comm, ranks, id, r, &config), kSuccess);
      body(nccl, comm, r);
      EXPECT_EQ(nccl.comm_destroy(comm), kSuccess);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

Result async_error(const Api& nccl, Comm comm) {
  Result result = kSuccess;
  EXPECT_EQ(nccl.comm_get_async_error(comm, &result), kSuccess);
  return result;
}

TEST(NcclStandIn, RingOfMessagesLongerThanItsBuffers) {
  on_ranks(3, [](const Api& nccl, Comm comm, int rank) {
    std::vector<float> out(300000), in(300000);
    std::iota(out.begin(), out.end(), static_cast<float>(rank));
    nccl.group_start();
    nccl.send(out.data(), out.size(), kFloat32, (rank + 1) % 3, comm, nullptr);
    nccl.recv(in.data(), in.size(), kFloat32, (rank + 2) % 3, comm, nullptr);
    EXPECT_EQ(nccl.group_end(), kSuccess);
    EXPECT_EQ(in.front(), static_cast<float>((rank + 2) % 3));
    EXPECT_EQ(in.back(), 299999.0f + static_cast<float>((rank + 2) % 3));
  });
}

TEST(NcclStandIn, CollectivesAndSplits) {
  on_ranks(4, [](const Api& nccl, Comm comm, int rank) {
    std::vector<int> all(8, -1);
    all[static_cast<std::size_t>(2 * rank)] = rank;
    all[static_cast<std::size_t>(2 * rank + 1)] = 10 * rank;
    nccl.all_gather(&all[static_cast<std::size_t>(2 * rank)], all.data(), 2, kInt32, comm, nullptr);
    EXPECT_EQ(all, (std::vector<int>{0, 0, 1, 10, 2, 20, 3, 30}));

    std::vector<double> sums(4, rank);
    double own = 0;
    nccl.reduce_scatter(sums.data(), &own, 1, kFloat64, kSum, comm, nullptr);
    EXPECT_EQ(own, 6);

    Comm half = nullptr;
    Config config;
    EXPECT_EQ(nccl.comm_split(comm, rank % 2, -rank, &half, &config), kSuccess);  // higher ranks first
    int place = -1;
    nccl.comm_user_rank(half, &place);
    EXPECT_EQ(place, rank < 2 ? 1 : 0);
    float sum = static_cast<float>(rank);
    nccl.all_reduce(&sum, &sum, 1, kFloat32, kSum, half, nullptr);
    EXPECT_EQ(sum, static_cast<float>(2 * (rank % 2) + 2));
    nccl.comm_destroy(half);

    Comm none = comm;
    EXPECT_EQ(nccl.comm_split(comm, rank == 0 ? -1 : 5, 0, &none, &config), kSuccess);
    EXPECT_EQ(none == nullptr, rank == 0);
    if (none != nullptr) nccl.comm_destroy(none);
  });
}

TEST(NcclStandIn, MessagesThatDoNotMatchAreNamed) {
  on_ranks(2, [](const Api& nccl, Comm comm, int rank) {
    std::vector<char> data(64);
    if (rank == 0) {
      nccl.send(data.data(), 48, kInt8, 1, comm, nullptr);
      return;
    }
    nccl.recv(data.data(), 64, kInt8, 0, comm, nullptr);
    EXPECT_EQ(async_error(nccl, comm), kInvalidUsage);
    EXPECT_THAT(nccl.get_last_error(comm),
                AllOf(HasSubstr("rank 1 expects send/receive of 64"), HasSubstr("finds send/receive of 48")));
  });
}

TEST(NcclStandIn, WaitsNoLongerThanItsDeadline) {
  const Environment timeout("DATTN_NCCL_STANDIN_TIMEOUT_S", "0.2");
  const Environment fault("DATTN_NCCL_FAULT", "drop 0 1");
  on_ranks(2, [](const Api& nccl, Comm comm, int rank) {
    int value = 7;
    for (int i = 0; i < 2; ++i) {
      if (rank == 0) nccl.send(&value, 1, kInt32, 1, comm, nullptr);
      if (rank == 1) nccl.recv(&value, 1, kInt32, 0, comm, nullptr);
      EXPECT_EQ(async_error(nccl, comm), rank == 1 && i == 1 ? kSystemError : kSuccess);
    }
  });
}

TEST(NcclStandIn, InitialisationInTheBackgroundCanBeAborted) {
  const Environment fault("DATTN_NCCL_FAULT", "absent 1");
  const Api nccl = api();
  UniqueId id{};
  nccl.get_unique_id(&id);
  Comm comm = nullptr;
  Config config;
  config.blocking = 0;
  ASSERT_EQ(nccl.comm_init_rank_config(&comm, 2, id, 0, &config), kInProgress);
  EXPECT_EQ(async_error(nccl, comm), kInProgress);
  int value = 0;
  EXPECT_EQ(nccl.send(&value, 1, kInt32, 1, comm, nullptr), kInvalidUsage);
  EXPECT_EQ(nccl.comm_abort(comm), kSuccess);
}

TEST(FindNccl, RefusesAVersionThatIsTooOldAndSaysWhatItTried) {
  std::string report;
  {
    const Environment version("DATTN_NCCL_STANDIN_VERSION", "21805");
    EXPECT_FALSE(find_nccl(report));
    EXPECT_THAT(report, AllOf(HasSubstr("is NCCL 2.18.5"), HasSubstr("2.19.0 is needed")));
  }
  const auto found = find_nccl(report);
  ASSERT_TRUE(found);
  EXPECT_THAT(report, AllOf(HasSubstr("NCCL 2.28.9"), HasSubstr(std::getenv("DATTN_NCCL"))));
  const Environment nowhere("DATTN_NCCL", "/nowhere/libnccl.so.2");
  EXPECT_FALSE(find_nccl(report));
  EXPECT_THAT(report, HasSubstr("/nowhere/libnccl.so.2"));
  const Environment other("DATTN_NCCL", "libm.so.6");
  EXPECT_FALSE(probe_nccl().found);
  EXPECT_THAT(probe_nccl().detail, HasSubstr("is no NCCL"));
}

TEST(FindNccl, VersionsAreSpelledOut) {
  EXPECT_EQ(version_text(22809), "2.28.9");
  EXPECT_EQ(version_text(2804), "2.8.4");
}

}  // namespace
}  // namespace dattn::nccl
