// Measures this machine as the simulator sees machines: the present ranks, with the threads each has.
#pragma once

#include <string>

#include "launch/commands/commands.h"

namespace dattn {

// Called by all ranks, at least two. Rank 0 writes a machine file for `dattn plan --simulate` and gets what it says.
Json calibrate(Communicator& world, const std::string& path);

}  // namespace dattn
