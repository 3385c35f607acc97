// The conformance tests on ranks as processes: run under mpirun, every process runs all tests. Rank 0 reports as GoogleTest
// does, the others their failures alone.
#include <numeric>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "launch/bootstrap.h"
#include "tests/conformance/ranks.h"
#include "tests/conformance/sweep.h"

namespace dattn::conformance {
namespace {

Communicator* job = nullptr;

class Failures : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed()) fmt::print(stderr, "rank {}: {}\n", job->rank(), result.message());
  }
};

void report_failures_alone() {
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  delete listeners.Release(listeners.default_xml_generator());  // or that of JSON
  listeners.Append(new Failures);
}

void run_tests(Communicator& world) {
  job = &world;
  if (world.rank() != 0) report_failures_alone();
  const bool passed = RUN_ALL_TESTS() == 0;
  int failed = 0;
  for (const std::string& rank : world.gather_strings(passed ? "" : "failed", {"conformance"})) failed += rank.empty() ? 0 : 1;
  ensure(failed == 0, "conformance tests failed on {} of {} processes", failed, world.size());
  require(testing::UnitTest::GetInstance()->test_to_run_count() > 0, "--gtest_filter chooses no test on {} processes",
          world.size());
}

}  // namespace

std::vector<int> rank_counts() { return {detect_launch().size}; }

int most_ranks() { return detect_launch().size; }

void run_ranks(int ranks, const std::function<void(Communicator& world)>& body) {
  if (job->rank() >= ranks) return;
  std::vector<int> first(static_cast<std::size_t>(ranks));
  std::iota(first.begin(), first.end(), 0);
  body(*job->split(first, fmt::format("first {}", ranks)));
}

}  // namespace dattn::conformance

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  GTEST_FLAG_SET(catch_exceptions, false);  // one that leaves a test ends the job: the others wait for this rank
  return dattn::run_job({.devices = dattn::conformance::test_devices()}, dattn::conformance::run_tests);
}
