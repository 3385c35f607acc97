// Device tensors over a communicator that moves host memory only (thread, mpi, tcp), for jobs without NCCL: parts on a device
// are copied through pinned host memory.
//
//   start: device --copy, on a stream of its own--> pinned --the host waits for it--> start of the inner communicator
//   wait:  wait of the inner communicator; pinned --copy, on the current stream--> device
//
// Correct everywhere and slow: the start of a transfer holds up the host until what the device had been given is done.
#pragma once

#include <memory>

#include "parallel/comm/communicator.h"

namespace dattn {

std::unique_ptr<Communicator> staged(std::unique_ptr<Communicator> inner);

}  // namespace dattn
