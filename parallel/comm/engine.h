// Engine: the communicator over processes. It keeps the order of transfers, waits, tells the living from the dead
// (liveness.h) and ends the job; MPI and TCP are thin transports under it.
//
// Who calls the transport: a thread that waits polls it itself (a message costs no hand-over), and a progress thread
// polls it while nobody waits, so that transfers move and questions are answered during computation. One mutex keeps
// them apart. Waiting is polite, since ranks may outnumber cores: yield at first, then sleep an eighth of the time
// waited; the progress thread sleeps 100 us while transfers are under way, 5 ms otherwise.
#pragma once

#include <memory>

#include "parallel/comm/thread.h"
#include "parallel/comm/transport.h"

namespace dattn {

// The world of the job that the transport belongs to. When it and all its parts are gone, the ranks take leave of each
// other and the transport is shut down; after an abort, or while an exception unwinds, without taking leave.
std::unique_ptr<Communicator> engine_world(std::unique_ptr<Transport> transport, const CommOptions& options);

}  // namespace dattn
