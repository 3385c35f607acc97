// Ranks that are devices of one JAX process.
//
//   device 0: custom call --+                      +--> thread of rank 0: dattn call --+--> result ready, on another thread
//   device 1: custom call --+-- all have arrived --+--> thread of rank 1: dattn call --+--> result ready
//
// XLA runs a program on each device by threads of a small pool, and calls that do not depend on each other in any order. So a
// custom call never blocks (on CUDA it does, where XLA gives each device a thread of its own): it leaves a request here. The
// ranks' requests for one call of one execution of the program meet by (run, call site), and are then handed to the ranks'
// threads together, so that all ranks make their calls in one order. Every wait has a deadline.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "plugins/jax/call.h"

namespace dattn::jax {

// Runs each task at once on a thread of its own, or one that has become idle: what follows a result may block.
void run_soon(std::function<void()> task);

// Gives the request to the gang of its ranks, which is made with the first one. `done` is called whatever happens.
void submit(CallRequest request);

// What gangs are told apart by.
struct GangKey {
  int ranks;
  std::int64_t group;
  std::int32_t device_type;
  int threads;
  double timeout_s;

  bool operator<(const GangKey& other) const;
};

// The ranks of one communicator: a thread each. Ends, and is replaced by a new one, with the first failure.
class Gang : public std::enable_shared_from_this<Gang> {
 public:
  // Throws std::runtime_error with the C interface's message.
  explicit Gang(GangKey key, dattn_device device);
  ~Gang();
  Gang(const Gang&) = delete;
  Gang& operator=(const Gang&) = delete;

  void start();                       // the threads, which keep the gang alive
  bool submit(CallRequest& request);  // false where the gang has ended; then the request is the caller's still
  const GangKey& key() const { return key_; }

 private:
  using Clock = std::chrono::steady_clock;
  using Meeting = std::pair<std::int64_t, const CallSite*>;  // run, call site

  struct Arrivals {
    std::vector<std::optional<CallRequest>> of_rank;
    int count = 0;
    Clock::time_point deadline;
  };
  struct Handles;

  void work(int rank);
  void watch();
  Outcome perform(std::unique_ptr<Handles>& handles, const CallRequest& request);
  void end(const Outcome& outcome, int rank);
  std::string missing_text(const Arrivals& arrivals) const;

  GangKey key_;
  std::vector<dattn_comm*> comms_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  std::map<Meeting, Arrivals> meetings_;
  std::vector<std::deque<CallRequest>> queues_;  // of each rank
};

}  // namespace dattn::jax
