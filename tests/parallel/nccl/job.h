// Jobs of the NCCL back end in one process: ranks are threads, each with a device of its own where there are enough.
#pragma once

#include <functional>
#include <string>

#include "parallel/comm/nccl.h"
#include "parallel/comm/thread.h"

namespace dattn::test {

using RankBody = std::function<void(Communicator& world)>;

// A rank's device, and a communicator over the threads' one that its back end is made of.
using WorldMaker = std::function<std::unique_ptr<Communicator>(std::unique_ptr<Communicator> control)>;
void run_device_ranks(int ranks, double timeout_s, const WorldMaker& make, const RankBody& body);

void run_nccl_ranks(int ranks, const NcclOptions& options, const RankBody& body);

// Runs a job that must fail; its error and how long it took.
struct Outcome {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
  double seconds = 0;
};
Outcome failure_of(const std::function<void()>& job);

// Sets a variable of the environment until the end of the scope.
class Environment {
 public:
  Environment(const char* name, const std::string& value);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::string before_;
  bool was_set_ = false;
};

}  // namespace dattn::test
