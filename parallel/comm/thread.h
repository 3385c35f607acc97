// Ranks as threads of one process: the embedded default, the tests, several ranks on one device.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "parallel/comm/communicator.h"

namespace dattn {

struct CommOptions {
  double timeout_s = 60.0;  // a peer that shows no sign of life for this long has failed
};

// Runs body(world) on `ranks` threads and joins them. The first exception, by time, is rethrown after every other rank
// has been ended by it; the error context of each thread is "rank r/n", and each has cores / ranks threads of its own.
void run_thread_ranks(int ranks, const CommOptions& options, const std::function<void(Communicator&)>& body);

// The same for threads of the host program: one world each, by rank. A rank's work is over when its communicators are gone.
std::vector<std::unique_ptr<Communicator>> thread_worlds(int ranks, const CommOptions& options);

// The group of one.
std::unique_ptr<Communicator> self_communicator();

}  // namespace dattn
