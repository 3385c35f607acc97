// Ranks as processes joined by TCP sockets, for launchers that bring no MPI (torchrun). Every rank holds one connection
// to every other one.
#pragma once

#include <string>

#include "parallel/comm/thread.h"

namespace dattn {

struct TcpJob {
  std::string host;  // of rank 0, which listens there
  int port = 0;
  int rank = 0;
  int size = 1;
};

// Joins the job; waits for all its ranks, at least a minute. Throws Error(kPeer) naming the ranks that did not come, and
// Error(kSystem) where the address cannot be used.
std::unique_ptr<Communicator> tcp_world(const TcpJob& job, const CommOptions& options);

}  // namespace dattn
