// Ranks with a CUDA device each, joined by NCCL. Device tensors travel by NCCL: one NCCL communicator and one stream for each
// group of ranks, beside computation, joined to it by events alone. Host memory (errors, shapes, names) travels by a control
// communicator of any kind (thread, mpi, tcp), which also carries signs of life, abort and NCCL's unique ids.
//
//   current stream   --compute--*----------------compute----------*--compute-->
//                         start | ready event           done event | wait
//   the group's stream          *--ncclSend, ncclRecv (grouped)----*
//
// A transfer holds up the device, not the host, so a watcher thread looks after it: when NCCL reports an error, or a transfer
// that could begin has not ended within the deadline, or the job has ended elsewhere, it ends the job over the control
// communicator and aborts NCCL, so that streams run empty; the host hears the reason in its next call or synchronisation
// (core/device/check.h). NCCL gives no signs of life: on devices, a peer that computes for longer than the deadline while
// others wait for it counts as failed.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "parallel/comm/communicator.h"
#include "parallel/comm/nccl_api.h"

namespace dattn {

// What trades the device's thread blocks and memory for the speed of transfers. nccl_world refuses what the library's version
// does not have.
struct NcclTuning {
  int max_ctas = 0;       // thread blocks that NCCL may take from computation; 0: NCCL's choice
  bool zero_cta = false;  // transfers by copy engines where NCCL (2.28, over NVLink) can; see symmetric_bytes

  // Of a group's buffer in symmetric memory (NCCL 2.27): gathers of equal slots go through it, which lets them take NVLink's
  // short ways, and no thread blocks with zero_cta. 0: none.
  std::int64_t symmetric_bytes = 0;

  // Registers the memory of transfers with NCCL, once each. Off by default: it pays only where the memory is shared by handles
  // (ncclMemAlloc, cuMem), and memory of CUDA's stream-ordered pools is not.
  bool register_buffers = false;
};

struct NcclOptions {
  double timeout_s = 60;

  // Sums in rank order, so that runs repeat: pieces are gathered and added on the device. Otherwise NCCL's own reductions,
  // which move fewer bytes, but whose order of additions depends on the algorithm that NCCL picks for size, topology and
  // version.
  bool ordered_sums = true;

  // With every transfer, ranks tell their peers over the control communicator what they are about to do; the first difference
  // is named. Costs a message each, which wait() waits for; for finding out which calls do not match. DATTN_COMM_CHECK=1.
  bool check_calls = false;

  NcclTuning tuning{};

  // The world's id in a file that all ranks see, for a control communicator that should not carry it: rank 0 writes it, and
  // takes it away when all have come. DATTN_NCCL_ID_FILE.
  std::string id_file{};

  // A host framework's ncclComm_t of the same ranks on this device: used for the world and never destroyed or aborted. So when
  // a job fails with transfers under way on it, they end when the framework aborts it; `stuck` is called where that takes too
  // long.
  nccl::Comm lent = nullptr;

  // Called by the watcher when a failed job's streams have not run empty drain_s after NCCL's abort, so that the host may be
  // held up for ever: the command ends the process. Without it nothing more is done.
  std::function<void(const JobEnd& end)> stuck{};
  double drain_s = 10;

  static NcclOptions from_environment(double timeout_s);
};

// The calling thread's current device, a CUDA one, becomes this rank's. All ranks of `control` make the call. Throws
// Error(kSystem) where NCCL is not found, saying what was looked for, and Error(kPeer) when not all come within the deadline.
//
// partition() makes the groups' NCCL communicators by ncclCommSplit. split() cannot, since not all ranks of the group take
// part: it makes one from an id that travels over the control communicator of the sub-group. Both wait for all ranks of the
// sub-group (making it at the first transfer instead would bind the order of transfers in different groups), so ranks that
// share several groups must make them in one order.
std::unique_ptr<Communicator> nccl_world(std::unique_ptr<Communicator> control, const NcclOptions& options);

}  // namespace dattn
