// What all groups of one rank share: NCCL, the control communicator, the watcher. And a group: one NCCL communicator, one
// stream, the transfers under way on it. Everything in here happens under the job's mutex, which no call holds for long:
// communicators are non-blocking, and whoever waits for NCCL polls.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/device/check.h"
#include "core/device/stream.h"
#include "parallel/comm/communicator.h"
#include "parallel/comm/nccl.h"
#include "parallel/comm/nccl_api.h"

namespace dattn {

using NcclClock = std::chrono::steady_clock;

// One group of transfers, from its start until its end on the device.
struct DeviceTransfer {
  struct Part {
    int peer = -1;  // rank of the world; -1: all ranks of the group
    bool sending = false;
    std::size_t bytes = 0;
  };
  OpLabel label;
  std::vector<Part> parts;
  Event ready, done;
  std::optional<NcclClock::time_point> since;  // when it was first seen able to run

  DeviceTransfer(Device device, const OpLabel& of) : label(of), ready(device), done(device) {}
};

class NcclGroup {
 public:
  NcclGroup(const nccl::Api& api, Device device, std::vector<int> members, int place, std::string title)
      : nccl(api), ranks(std::move(members)), rank(place), name(std::move(title)), stream(device) {}
  ~NcclGroup() { destroy(); }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  int size() const { return static_cast<int>(ranks.size()); }
  void register_memory(const void* memory, std::size_t bytes);
  nccl::Result finish();    // first half of a clean end: nothing is under way any more
  void abandon() noexcept;  // aborts what is under way; a lent communicator is only forgotten
  void destroy() noexcept;  // after either
  std::string error_text(nccl::Result result) const;

  const nccl::Api& nccl;
  const std::vector<int> ranks;  // of the world
  const int rank;                // in this group
  const std::string name;
  const Stream stream;
  nccl::Comm comm = nullptr;
  bool lent = false;
  bool settling = false;                                  // a thread polls it, and tells what fails
  std::deque<std::shared_ptr<DeviceTransfer>> under_way;  // in the order of the stream

  // Symmetric memory: one buffer, the same on all ranks.
  void* arena = nullptr;
  std::size_t arena_bytes = 0;
  nccl::Window window = nullptr;

 private:
  std::map<std::pair<const void*, std::size_t>, void*> registered_;
};

class NcclJob {
 public:
  NcclJob(std::unique_ptr<Communicator> control, const nccl::Api& api, Device device, const NcclOptions& options);
  ~NcclJob();
  NcclJob(const NcclJob&) = delete;
  NcclJob& operator=(const NcclJob&) = delete;

  const nccl::Api nccl;
  const Device device;
  const NcclOptions options;
  std::mutex mutex;

  Communicator& control() const;  // of the world
  // Groups of equal ranks and name are the same group.
  // `parent`: the group that is partitioned into it and others. Those of another parent are other groups, since all ranks of a
  // parent have to make its parts at once, or to have made them.
  std::shared_ptr<NcclGroup> group(const std::vector<int>& ranks, int rank, std::string_view name,
                                   const NcclGroup* parent = nullptr);

  // Calls make(comm, config) under the mutex to begin the group's communicator, and waits until it is ready.
  template <class Make>
  void create(NcclGroup& group, const char* what, const Make& make) {
    std::unique_lock lock(mutex);
    check_running_locked();
    nccl::Config config = configuration(group);
    const nccl::Result result = make(&group.comm, &config);
    settle(lock, group, result, what);
  }
  void make_arena(NcclGroup& group);

  // Calls enqueue() between ncclGroupStart and ncclGroupEnd, then after(), for further work on the group's stream. All begins
  // after what the current stream has been given.
  template <class Enqueue, class After>
  void launch(NcclGroup& group, const std::shared_ptr<DeviceTransfer>& transfer, const Enqueue& enqueue, const After& after) {
    std::unique_lock lock(mutex);
    check_running_locked();
    transfer->ready.record(current_stream());
    group.stream.wait(transfer->ready);
    nccl::Result result = nccl.group_start();
    if (result == nccl::kSuccess) {
      result = enqueue();
      const nccl::Result ended = nccl.group_end();
      if (result == nccl::kSuccess || result == nccl::kInProgress) result = ended;
    }
    settle(lock, group, result, transfer->label.verb);
    after();
    transfer->done.record(group.stream);
    forget_finished(group);
    group.under_way.push_back(transfer);
  }

  void check_running_locked() const;
  [[noreturn]] void fail_locked(const std::string& reason);
  void close() noexcept;  // ends NCCL's communicators and the control communicator

 private:
  nccl::Config configuration(const NcclGroup& group) const;
  // Waits until the group's communicator has done what it was asked to do, as long as the deadline allows.
  void settle(std::unique_lock<std::mutex>& lock, NcclGroup& group, nccl::Result result, std::string_view what);
  static void forget_finished(NcclGroup& group);
  void watch();
  std::string failure_of(NcclGroup& group);
  void check_work();  // of all groups, when the host has waited for the device
  void end_locked() noexcept;
  bool drained_locked() const;

  std::unique_ptr<Communicator> control_;
  std::map<std::tuple<std::vector<int>, std::string, const NcclGroup*>, std::shared_ptr<NcclGroup>> groups_;
  std::vector<std::shared_ptr<NcclGroup>> in_order_;  // of their making, the same on all ranks that share them
  std::condition_variable changed_;
  bool stop_ = false;
  bool abandoned_ = false;
  std::unique_ptr<DeviceCheck> check_;
  std::thread watcher_;
};

}  // namespace dattn
