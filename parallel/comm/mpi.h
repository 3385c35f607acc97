// Ranks as MPI processes. MPI sits behind a shim, libdattn_mpi.so, that is loaded when a launcher's variables say that
// this is an MPI job, so that the library and the command themselves need no MPI.
#pragma once

#include "parallel/comm/thread.h"

namespace dattn {

// Joins the MPI job this process was started in. Initialises MPI unless it is; finalises only what it initialised.
// host_comm: address of the host program's MPI_Comm, which is duplicated by all its ranks at once and kept by the host;
// nullptr: the world. One job at a time. Throws Error(kSystem) where the shim or MPI cannot be loaded, saying what was looked
// for and the remedy.
std::unique_ptr<Communicator> mpi_world(const CommOptions& options, const void* host_comm = nullptr);

struct ShimReport {
  bool found = false;
  std::string detail;  // MPI's version string, or what was looked for
};
ShimReport probe_mpi();  // for doctor; does not initialise MPI

}  // namespace dattn
