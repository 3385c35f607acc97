#include "parallel/comm/nccl_job.h"

#include <algorithm>
#include <exception>

#include <fmt/format.h>

#include "core/base/error.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

using std::chrono::duration;

constexpr std::size_t kMostRegistered = 1024;

double seconds_since(NcclClock::time_point begin) { return duration<double>(NcclClock::now() - begin).count(); }

std::string parts_text(const DeviceTransfer& transfer, const NcclGroup& group) {
  std::string text;
  constexpr std::size_t kNamed = 4;
  for (std::size_t i = 0; i < std::min(kNamed, transfer.parts.size()); ++i) {
    const DeviceTransfer::Part& part = transfer.parts[i];
    const std::string peer = part.peer < 0 ? "all ranks" : fmt::format("rank {}", part.peer);
    text += fmt::format("{}{} {} bytes {} {}", i == 0 ? "" : ", ", part.sending ? "sends" : "awaits", part.bytes,
                        part.sending ? "to" : "from", peer);
  }
  if (transfer.parts.size() > kNamed) text += fmt::format(" and {} more", transfer.parts.size() - kNamed);
  return fmt::format("rank {} {} in group '{}' of {} ({})", group.ranks[static_cast<std::size_t>(group.rank)], text, group.name,
                     group.size(), label_text(transfer.label));
}

}  // namespace

std::string NcclGroup::error_text(nccl::Result result) const {
  const char* last = comm != nullptr ? nccl.get_last_error(comm) : nullptr;
  std::string text = fmt::format("NCCL reports '{}'", nccl.get_error_string(result));
  if (last != nullptr && *last != '\0') text += fmt::format(" ({})", last);
  return text + "; NCCL_DEBUG=WARN says more";
}

void NcclGroup::register_memory(const void* memory, std::size_t bytes) {
  if (registered_.size() >= kMostRegistered) return;
  const auto [entry, fresh] = registered_.try_emplace({memory, bytes}, nullptr);
  if (fresh && nccl.comm_register(comm, const_cast<void*>(memory), bytes, &entry->second) != nccl::kSuccess)
    entry->second = nullptr;
}

nccl::Result NcclGroup::finish() {
  for (const auto& [key, handle] : registered_) {
    if (handle != nullptr) nccl.comm_deregister(comm, handle);
  }
  registered_.clear();
  if (window != nullptr) nccl.comm_window_deregister(comm, window);
  window = nullptr;
  return comm == nullptr || lent ? nccl::kSuccess : nccl.comm_finalize(comm);
}

void NcclGroup::abandon() noexcept {
  if (comm != nullptr && !lent) nccl.comm_abort(comm);
  comm = nullptr;
}

void NcclGroup::destroy() noexcept {
  if (comm != nullptr && !lent) nccl.comm_destroy(comm);
  comm = nullptr;
  if (arena != nullptr) nccl.mem_free(arena);
  arena = nullptr;
}

NcclJob::NcclJob(std::unique_ptr<Communicator> control, const nccl::Api& api, Device where, const NcclOptions& wanted)
    : nccl(api), device(where), options(wanted), control_(std::move(control)) {
  check_ = std::make_unique<DeviceCheck>(device, [this] { check_work(); });
  watcher_ = std::thread([this, context = error_context()] {
    set_error_context(context);
    watch();
  });
}

NcclJob::~NcclJob() { close(); }

Communicator& NcclJob::control() const {
  ensure(control_ != nullptr, "the world communicator is gone; keep it longer than its parts");
  return *control_;
}

std::shared_ptr<NcclGroup> NcclJob::group(const std::vector<int>& ranks, int rank, std::string_view name,
                                          const NcclGroup* parent) {
  const std::lock_guard lock(mutex);
  std::shared_ptr<NcclGroup>& entry = groups_[{ranks, std::string(name), parent}];
  if (!entry) {
    entry = std::make_shared<NcclGroup>(nccl, device, ranks, rank, std::string(name));
    in_order_.push_back(entry);
  }
  return entry;
}

nccl::Config NcclJob::configuration(const NcclGroup& group) const {
  nccl::Config config;
  config.blocking = 0;
  config.split_share = 0;  // groups transfer at the same time, which communicators of shared resources must not
  config.comm_name = group.name.c_str();
  if (options.tuning.max_ctas > 0) config.max_ctas = options.tuning.max_ctas;
  if (options.tuning.zero_cta) config.cta_policy = nccl::kCtaPolicyZero;
  return config;
}

void NcclJob::check_running_locked() const {
  const JobEnd end = control().job_end();
  if (end.rank >= 0) throw Error(ErrorCode::kPeer, end.reason);
}

void NcclJob::fail_locked(const std::string& reason) {
  control().abort(reason, ErrorCode::kPeer);
  end_locked();
  check_running_locked();
  throw Error(ErrorCode::kPeer, reason);
}

void NcclJob::settle(std::unique_lock<std::mutex>& lock, NcclGroup& group, nccl::Result result, std::string_view what) {
  const auto begin = NcclClock::now();
  const auto text = [&] {
    return fmt::format("rank {} in group '{}' of {} ({})", group.ranks[static_cast<std::size_t>(group.rank)], group.name,
                       group.size(), what);
  };
  struct Settling {
    explicit Settling(bool& flag) : flag_(flag) { flag_ = true; }
    ~Settling() { flag_ = false; }
    bool& flag_;
  } const settling(group.settling);
  while (result == nccl::kInProgress || result == nccl::kSuccess) {
    if (group.comm == nullptr) break;  // a split that left this rank out, or one that has not begun
    nccl::Result state = nccl::kSuccess;
    const nccl::Result asked = nccl.comm_get_async_error(group.comm, &state);
    result = asked == nccl::kSuccess ? state : asked;
    if (result == nccl::kSuccess) return;
    if (result != nccl::kInProgress) break;
    const double waited = seconds_since(begin);
    if (waited > options.timeout_s) {
      fail_locked(
          fmt::format("NCCL did not connect the ranks of a group within {:.3g} s: {}; a rank crashed, is stopped, does not "
                      "make the same calls, or its network is closed (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO); see their "
                      "output, or raise comm.timeout_s",
                      options.timeout_s, text()));
    }
    lock.unlock();
    std::this_thread::sleep_for(duration<double>(std::clamp(waited / 8, 20e-6, 5e-3)));
    lock.lock();
    check_running_locked();
  }
  if (result == nccl::kSuccess) return;
  check_running_locked();
  fail_locked(fmt::format("{}: {}", text(), group.error_text(result)));
}

void NcclJob::make_arena(NcclGroup& group) {
  if (options.tuning.symmetric_bytes == 0) return;
  constexpr std::size_t kPage = 4096;
  std::unique_lock lock(mutex);
  check_running_locked();
  group.arena_bytes = (static_cast<std::size_t>(options.tuning.symmetric_bytes) + kPage - 1) / kPage * kPage;
  nccl::Result result = nccl.mem_alloc(&group.arena, group.arena_bytes);
  if (result == nccl::kSuccess) {
    result = nccl.comm_window_register(group.comm, group.arena, group.arena_bytes, &group.window, nccl::kWindowSymmetric);
  }
  settle(lock, group, result, "symmetric memory");
}

void NcclJob::forget_finished(NcclGroup& group) {
  while (!group.under_way.empty() && group.under_way.front()->done.done()) group.under_way.pop_front();
}

// Why a group's transfers cannot end, or nothing.
std::string NcclJob::failure_of(NcclGroup& group) {
  if (group.comm == nullptr || group.settling) return {};
  forget_finished(group);
  nccl::Result state = nccl::kSuccess;
  const nccl::Result asked = nccl.comm_get_async_error(group.comm, &state);
  const nccl::Result result = asked == nccl::kSuccess ? state : asked;
  DeviceTransfer* first = group.under_way.empty() ? nullptr : group.under_way.front().get();
  if (result != nccl::kSuccess && result != nccl::kInProgress) {
    const std::string where = first != nullptr ? parts_text(*first, group) : fmt::format("group '{}'", group.name);
    return fmt::format("{}: {}", where, group.error_text(result));
  }
  if (first == nullptr) return {};
  if (!first->since && first->ready.done()) first->since = NcclClock::now();
  if (!first->since || seconds_since(*first->since) <= options.timeout_s) return {};
  return fmt::format(
      "a transfer between devices has not ended for {:.3g} s: {}; a rank crashed, is stopped, its link is down, or "
      "the ranks do not make the same calls in the same order (DATTN_COMM_CHECK=1 finds out); see their output, or "
      "raise comm.timeout_s",
      options.timeout_s, parts_text(*first, group));
}

void NcclJob::check_work() {
  const std::lock_guard lock(mutex);
  check_running_locked();
  for (const auto& group : in_order_) {
    const std::string reason = failure_of(*group);
    if (!reason.empty()) fail_locked(reason);
  }
}

void NcclJob::end_locked() noexcept {
  if (abandoned_) return;
  abandoned_ = true;
  for (const auto& group : in_order_) group->abandon();
}

bool NcclJob::drained_locked() const {
  return std::all_of(in_order_.begin(), in_order_.end(), [](const auto& group) {
    forget_finished(*group);
    return group->under_way.empty();
  });
}

void NcclJob::watch() {
  const double nap = std::clamp(options.timeout_s / 16, 0.01, 0.2);
  std::optional<NcclClock::time_point> ended;
  std::unique_lock lock(mutex);
  try {
    const DeviceScope scope(device);
    while (!stop_) {
      changed_.wait_for(lock, duration<double>(nap), [this] { return stop_; });
      if (stop_) return;
      if (control_->job_end().rank < 0) {
        for (const auto& group : in_order_) {
          const std::string reason = failure_of(*group);
          if (reason.empty()) continue;
          control_->abort(reason, ErrorCode::kPeer);
          break;
        }
      }
      const JobEnd end = control_->job_end();
      if (end.rank < 0) continue;
      end_locked();
      if (!ended) ended = NcclClock::now();
      if (drained_locked()) return;
      if (seconds_since(*ended) > options.drain_s) {
        lock.unlock();
        if (options.stuck) options.stuck(end);
        return;
      }
    }
  } catch (const std::exception& error) {  // of the device: it is lost
    if (!lock.owns_lock()) lock.lock();
    control_->abort(error.what(), ErrorCode::kSystem);
    end_locked();
  }
}

// A clean end lets transfers finish, in the order the groups were made; any other aborts them.
void NcclJob::close() noexcept {
  {
    const std::lock_guard lock(mutex);
    if (stop_) return;
    stop_ = true;
  }
  changed_.notify_all();
  watcher_.join();
  check_.reset();
  std::unique_lock lock(mutex);
  try {
    const DeviceScope scope(device);
    // An exception on its way out ends the job with its own words, further out.
    if (std::uncaught_exceptions() > 0) end_locked();
    const auto begin = NcclClock::now();
    for (const auto& group : in_order_) {
      if (abandoned_ || control_->job_end().rank >= 0) break;
      settle(lock, *group, group->finish(), "leave");
      while (!group->under_way.empty()) {
        const std::string failure = failure_of(*group);
        if (!failure.empty() || seconds_since(begin) > options.timeout_s) {
          fail_locked(failure.empty() ? "transfers were still under way at the end: the ranks do not make the same calls"
                                      : failure);
        }
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
    if (control_->job_end().rank >= 0) end_locked();
  } catch (...) {
    // The job has ended with its reason.
  }
  for (const auto& group : in_order_) group->destroy();
  in_order_.clear();
  groups_.clear();
  lock.unlock();
  control_.reset();
}

}  // namespace dattn
