// What every communicator must do, as functions of a world of any size: run on thread ranks and on MPI processes alike, with
// tensors on the thread's current device. A case throws where something is wrong.
#pragma once

#include <string>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn::test {

struct Case {
  std::string name;
  void (*run)(Communicator& world);
};

const std::vector<Case>& collective_cases();

// The last rank comes a second late to a barrier: the others leave the processor to whoever has work. Takes longer than a case.
void waiting_ranks_sleep(Communicator& world);

}  // namespace dattn::test
