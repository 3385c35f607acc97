// One rank of a stand-in communicator: its transfers and how they progress, its errors, and the faults it was told to have.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "parallel/comm/nccl_api.h"
#include "tests/standins/nccl/segment.h"

namespace standin {

namespace nccl = dattn::nccl;

// DATTN_NCCL_FAULT, "KIND RANK [N [SECONDS]]"; RANK and N (from 0) are counted in every communicator on its own:
//   drop R N      rank R's N-th message is never sent
//   delay R N S   ... is sent S seconds late
//   hang R N S    ... holds its stream up for S seconds, whatever is aborted meanwhile
//   async R N     rank R's N-th message is not sent and its communicator fails with ncclRemoteError
//   init R CODE   rank R's initialisation returns this result
//   absent R      rank R never joins
struct Fault {
  std::string kind;
  int rank = -1;
  int number = 0;
  double seconds = 0;

  static Fault from_environment();
  bool is(const char* what, int of) const { return kind == what && rank == of; }
};

enum class Kind : std::uint32_t { kPointToPoint, kAllGather, kReduceScatter, kAllReduce };

// Travels before the bytes of a message, and must be what the receiver expects.
struct MessageHead {
  Kind kind = Kind::kPointToPoint;
  std::int32_t type = 0;
  std::uint64_t count = 0;
};

struct Transfer {
  bool sending = false;
  int peer = 0;
  char* data = nullptr;
  std::size_t bytes = 0;
  MessageHead head;
  std::uint64_t place = 0;  // in the order of its ring
  std::size_t done = 0;     // of head and bytes together
};

// What one group enqueues on one stream.
struct Work {
  std::vector<Transfer> transfers;
  std::vector<std::function<void()>> before;  // copies to oneself
  std::vector<std::function<void()>> after;   // sums
  std::vector<std::vector<char>> buffers;
};

class World {
 public:
  World(std::string name, int ranks, int rank);

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  const std::string& name() const { return name_; }
  const Fault& fault() const { return fault_; }

  void join();  // waits for all; on abort returns early
  // All ranks say two values and hear everybody's; nothing after an abort.
  std::optional<std::vector<std::pair<std::int64_t, std::int64_t>>> meet(std::int64_t a, std::int64_t b);

  void enlist(Transfer& transfer);  // takes its place in the order of its ring
  void run(Work& work);             // on the stream's thread
  std::uint64_t meetings() const { return meetings_; }
  void abort() { aborted_ = true; }
  bool aborted() const { return aborted_; }

  nccl::Result state() const { return state_; }
  void fail(nccl::Result result, const std::string& why);
  void joined() {
    nccl::Result expected = nccl::kInProgress;
    state_.compare_exchange_strong(expected, nccl::kSuccess);
  }
  std::string last_error() const;

  std::atomic<int> registered{0};  // buffers
  std::atomic<bool> used{false};   // a group was issued
  std::atomic<bool> blocking{true};

 private:
  using Clock = std::chrono::steady_clock;
  bool progress(Transfer& transfer);  // moves what can be moved; true: something has
  bool begin_send(Transfer& transfer);
  bool check_head(const Transfer& transfer, const MessageHead& found);
  bool give_up(Clock::time_point begin, const std::string& what);

  std::string name_;
  int ranks_;
  int rank_;
  Segment segment_;
  Fault fault_;
  double timeout_s_;
  std::atomic<bool> aborted_{false};
  std::atomic<nccl::Result> state_{nccl::kInProgress};
  mutable std::mutex mutex_;
  std::string error_;
  std::uint64_t meetings_ = 0;
  int messages_ = 0;  // begun to be sent
  std::vector<std::uint64_t> enlisted_[2];
  std::vector<std::atomic<std::uint64_t>> finished_[2];  // by [sending][peer]
};

}  // namespace standin
