// Joining or creating the job: which launcher started this process, and running a body on every rank with one message and
// one exit code when it fails.
#pragma once

#include <functional>
#include <string>

#include "launch/devices.h"
#include "parallel/comm/communicator.h"

namespace dattn {

// What a launcher's variables say about this process.
struct Launch {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  // on this host
  int local_size = 1;
  std::string launcher;  // "openmpi", "slurm", "pmi", "torchrun"; empty: none
};
Launch detect_launch();  // throws Error(kBadInput) for variables that contradict each other

struct JobOptions {
  int ranks = 0;          // --ranks: ranks as threads of this process; 0: not given
  double timeout_s = 60;  // a rank that shows no sign of life for this long has failed
  int threads = 0;        // per rank; 0: max(1, cores / local ranks)
  DeviceOptions devices = {};
};

// Runs body(world) as one rank of the launcher's job (MPI, or TCP under torchrun, where rank 0 listens at MASTER_ADDR, port
// DATTN_TCP_PORT or MASTER_PORT + 1), or on --ranks threads, or alone; the rank's device is the thread's current one. The
// exit code: 0, or that of the error (core/base/error.h). Of all ranks that fail, one writes its error to stderr.
//
// After a failure of a job of processes this does not return: the processes, stopped ones included, are ended through the
// launcher, because neither MPI's end nor a rank's can be waited for. Nor does it when a thread rank cannot be ended.
int run_job(const JobOptions& options, const std::function<void(Communicator&)>& body);

}  // namespace dattn
