// Where the ranks of the conformance tests are: threads of the program (threads.cpp), or processes that run the same tests side
// by side (processes/main.cpp).
#pragma once

#include <functional>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn::conformance {

std::vector<int> rank_counts();  // the sizes of jobs that the sweep takes
int most_ranks();                // that a test may ask for

// body(world) on the first `ranks` ranks, each on its device (test_devices). Processes beside them go on at once, so that what
// body hands over to its test is there on the first rank alone: elsewhere a test has nothing to compare.
void run_ranks(int ranks, const std::function<void(Communicator& world)>& body);

}  // namespace dattn::conformance
