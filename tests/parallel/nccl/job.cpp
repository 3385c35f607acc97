#include "tests/parallel/nccl/job.h"

#include <chrono>
#include <cstdlib>
#include <numeric>

#include <gtest/gtest.h>

#include "core/device/cuda_module.h"

namespace dattn::test {

void run_device_ranks(int ranks, double timeout_s, const WorldMaker& make, const RankBody& body) {
  std::string why;
  const auto devices = static_cast<int>(cuda_devices(why).size());
  ASSERT_GT(devices, 0) << why;
  run_thread_ranks(ranks, {timeout_s}, [&](Communicator& threads) {
    const DeviceScope scope({DeviceKind::kCuda, static_cast<std::int8_t>(threads.rank() % devices)});
    std::vector<int> all(static_cast<std::size_t>(ranks));
    std::iota(all.begin(), all.end(), 0);
    const auto world = make(threads.split(all, "world"));
    body(*world);
  });
}

void run_nccl_ranks(int ranks, const NcclOptions& options, const RankBody& body) {
  run_device_ranks(
      ranks, options.timeout_s, [&](auto control) { return nccl_world(std::move(control), options); }, body);
}

Outcome failure_of(const std::function<void()>& job) {
  const auto begin = std::chrono::steady_clock::now();
  Outcome outcome;
  try {
    job();
    ADD_FAILURE() << "the job ended without an error";
  } catch (const Error& error) {
    outcome.code = error.code();
    outcome.message = error.what();
  }
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return outcome;
}

Environment::Environment(const char* name, const std::string& value) : name_(name) {
  if (const char* before = std::getenv(name)) {
    before_ = before;
    was_set_ = true;
  }
  setenv(name, value.c_str(), 1);
}

Environment::~Environment() {
  if (was_set_) {
    setenv(name_, before_.c_str(), 1);
  } else {
    unsetenv(name_);
  }
}

}  // namespace dattn::test
