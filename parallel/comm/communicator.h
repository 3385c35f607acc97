// Communicator: a group of ranks that exchange memory. One interface for every back end (thread, mpi, tcp, nccl) and
// for the decorators that count, trace or disturb. A group of one makes every method a no-op, so callers have no
// "if distributed". Every method works in every back end or construction fails; memory of devices travels over nccl, or
// over any other one inside staged.h, and is refused elsewhere.
//
// Transfers of device memory are work of the device: they begin when what the thread's current stream has been given before
// start() is done, and wait() makes that stream, not the host, wait for them. Their failures come out of later calls, and out
// of the host's next synchronisation with the device.
//
// All ranks of a group call the same methods in the same order. Every wait has a deadline: a peer that failed, vanished
// or stopped answering ends the wait with Error(kPeer) on every rank; nothing ever hangs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/error.h"
#include "core/tensor/tensor.h"

namespace dattn {

class Trace;

struct SendPart {
  int peer = 0;  // rank in this group; sending to oneself is allowed and costs no payload
  const void* data = nullptr;
  std::size_t bytes = 0;
  Device device{};  // where the memory is: the same for all parts of an exchange, on all ranks
};

struct RecvPart {
  int peer = 0;
  void* data = nullptr;
  std::size_t bytes = 0;
  Device device{};
};

// What an operation is for: named in errors and traces, and the key that bytes are counted under.
struct OpLabel {
  std::string_view verb = "exchange";  // a string literal: "rotate", "gather", "all_reduce", ..
  int layer = -1;                      // -1: not of a layer
  int step = -1;                       // step of a plan; -1: not of a plan
};

// How a job ended before its time: which rank ended it, and why. Every rank sees the same one.
struct JobEnd {
  int rank = -1;  // in the world; -1: the job runs
  ErrorCode code = ErrorCode::kPeer;
  std::string reason;
};

class Communicator {
 public:
  virtual ~Communicator() = default;  // never throws, never hangs: what is still under way is abandoned

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string_view name() const = 0;  // the axis: "world", "ring", "ulysses", "tensor", "data", ..

  // Starts all sends and receives of this rank as one group and returns a ticket. At most one part per direction and
  // peer. The memory must stay valid, and sent memory unchanged, until the wait. Parts of zero bytes are skipped on
  // both sides. Transfers of one group of ranks are matched in the order they were started.
  using Ticket = std::uint64_t;
  virtual Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) = 0;
  virtual void wait(Ticket ticket) = 0;  // throws Error(kPeer) naming rank, peer, verb, layer, step and bytes
  void exchange(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) {
    wait(start(sends, receives, label));
  }

  // The sub-group of the given ranks of this group (ascending, this rank among them): every rank of the sub-group makes the
  // same call, and ranks that share several groups make them in one order (nccl waits for the others, the rest communicates
  // nothing). Groups of equal ranks and name are the same group.
  virtual std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) = 0;
  // The same where every rank of this group makes the call at this point, for disjoint sub-groups of one size: cheaper for
  // nccl.
  virtual std::unique_ptr<Communicator> partition(std::span<const int> ranks, std::string_view name) {
    return split(ranks, name);
  }

  // Where this rank's work between exchanges is to be noted too; null where nobody traces the run.
  virtual Trace* trace() const { return nullptr; }

  // Ends the whole job: every rank's current and later waits fail with this reason, whatever group they wait in.
  virtual void abort(const std::string& reason) noexcept = 0;
  // The same, keeping the kind of the error for the exit code. Of ranks that fail at the same time the lowest is heard.
  virtual void abort(const std::string& reason, ErrorCode) noexcept { abort(reason); }
  virtual JobEnd job_end() const { return {}; }
  // For the command, after abort(): ends the processes of the job, stopped ones included, and this one. Returns only
  // where ranks are threads of this process.
  virtual void terminate_job(int /*exit_code*/) noexcept {}

  // Collectives, by default made of exchanges; a back end may replace them with native ones. Sums are taken in rank
  // order, so that all ranks hold the same bits and runs repeat. Contiguous tensors; sums and maxima of floating types,
  // added up in the accumulator type (fp32 for bf16) and rounded once. A device's tensors are summed there.
  virtual void all_reduce_sum(const TensorView& data, const OpLabel& label);
  virtual void all_reduce_max(const TensorView& data, const OpLabel& label);
  virtual void broadcast(std::span<std::byte> data, int root, const OpLabel& label);
  // all: one slot for each rank, of counts[r] elements, in rank order; on entry own slot is filled.
  virtual void all_gather(const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label);
  // all: as above, filled on entry on every rank; own: this rank's slot summed over the ranks.
  virtual void reduce_scatter_sum(const TensorView& all, std::span<const std::int64_t> counts, const TensorView& own,
                                  const OpLabel& label);
  virtual void barrier(const OpLabel& label);

  // Whether this call of a collective, with this tensor (`data` or `all`) and counts, is the back end's own, not made of
  // start() and wait(): decorators that look on ask.
  enum class Collective { kAllReduceSum, kAllGather, kReduceScatterSum };
  virtual bool has_native(Collective, const TensorView& /*data*/, std::span<const std::int64_t> /*counts*/) const {
    return false;
  }

  // Byte strings of any length from every rank, in rank order (small control data: errors, shapes, names).
  std::vector<std::string> gather_strings(const std::string& mine, const OpLabel& label);
};

// All ranks of the world again, as a group that may be given away, under the world's name or another.
std::unique_ptr<Communicator> whole_group(Communicator& world, std::string_view name);
std::unique_ptr<Communicator> whole_group(Communicator& world);

}  // namespace dattn
