#include "parallel/comm/thread.h"
#include "tests/conformance/ranks.h"
#include "tests/conformance/sweep.h"

namespace dattn::conformance {

std::vector<int> rank_counts() { return {1, 2, 3, 4, 5, 6, 7, 8}; }

int most_ranks() { return 8; }

void run_ranks(int ranks, const std::function<void(Communicator& world)>& body) {
  run_thread_ranks(ranks, {}, [&](Communicator& world) { run_on_device(test_devices(), world, 60, body); });
}

}  // namespace dattn::conformance
