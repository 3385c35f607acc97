// Measures this machine as the simulator sees machines: the present ranks, with the threads each has.
#pragma once

#include <string>

#include "launch/commands/commands.h"
#include "parallel/machine.h"

namespace dattn {

// A link and the messages that it follows from: bytes, milliseconds, gbyte_per_s of each size.
struct MeasuredLink {
  Link link;
  Json sizes;
};

// Every rank of `group` sends to its rank `to` while it receives from its rank `from`, all at once; ranks for which both are -1
// look on. Called by all ranks of the world.
MeasuredLink measure_link(Communicator& world, Communicator& group, int to, int from, int repeat);

// With `made` ("Measured by ..") and how to use it in a comment at its head.
void write_machine(const std::string& path, const Machine& machine, const std::string& made);

// Called by all ranks, at least two. Rank 0 writes a machine file for `dattn plan --simulate` and gets what it says.
Json calibrate(Communicator& world, const std::string& path);

}  // namespace dattn
