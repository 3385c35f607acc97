// Ranks as threads. A send is copied at once into a mailbox of its destination; the receiver takes it out in its wait, on
// its own thread. So no rank ever touches the memory of another, whatever fails in between, and a waiting rank sleeps on
// a condition variable.
//
//   rank 0: start(send 1) --copy--> mailbox (group, 0 -> 1, number) --wait()--> memory of rank 1
#include "parallel/comm/thread.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <tuple>

#include <fmt/format.h>

#include "core/base/threads.h"
#include "core/tensor/host_memory.h"
#include "parallel/comm/liveness.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

Seconds now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Message {
  HostBytes data;
  OpLabel label;
};

// (group, source, destination), ranks of the world; messages of one channel are numbered in the order they are started.
using Channel = std::tuple<int, int, int>;

// What the ranks of one run share; everything but the copying happens under the mutex.
struct ThreadJob {
  ThreadJob(int ranks, double timeout)
      : timeout_s(timeout), waits(ranks), arrived(static_cast<std::size_t>(ranks)), errors(static_cast<std::size_t>(ranks)) {}

  const double timeout_s;
  std::mutex mutex;
  JobEnd end;
  WaitTable waits;
  std::vector<std::condition_variable> arrived;  // per rank: a message, or the end of the job
  std::map<std::pair<std::vector<int>, std::string>, int> groups;
  std::map<Channel, std::uint64_t> sent, awaited;  // next numbers
  std::map<std::pair<Channel, std::uint64_t>, Message> mailboxes;
  std::vector<std::exception_ptr> errors;  // that left the body, per rank

  void end_locked(int rank, ErrorCode code, const std::string& reason) {
    if (end.rank >= 0) return;
    end = {rank, code, reason};
    for (auto& condition : arrived) condition.notify_all();
  }
  void check_running_locked() const {
    if (end.rank >= 0) throw Error(ErrorCode::kPeer, end.reason);
  }
  int group_id(const std::vector<int>& ranks, const std::string& name) {
    const std::lock_guard lock(mutex);
    return groups.try_emplace({ranks, name}, static_cast<int>(groups.size())).first->second;
  }
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<ThreadJob> job, std::vector<int> ranks, int rank, std::string name)
      : job_(std::move(job)), ranks_(std::move(ranks)), rank_(rank), name_(std::move(name)) {
    id_ = job_->group_id(ranks_, name_);
  }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  std::string_view name() const override { return name_; }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override;
  void wait(Ticket ticket) override;

  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override {
    const int place = check_split(ranks, rank_, size(), name);
    std::vector<int> members;
    for (const int r : ranks) members.push_back(world(r));
    return std::make_unique<ThreadCommunicator>(job_, std::move(members), place, std::string(name));
  }

  void abort(const std::string& reason) noexcept override { abort(reason, ErrorCode::kPeer); }
  void abort(const std::string& reason, ErrorCode code) noexcept override {
    const std::lock_guard lock(job_->mutex);
    job_->end_locked(world(rank_), code, reason);
  }
  JobEnd job_end() const override {
    const std::lock_guard lock(job_->mutex);
    return job_->end;
  }

 private:
  struct Receive {
    RecvPart part;
    std::uint64_t number = 0;
  };
  struct Operation {
    OpLabel label;
    std::vector<Receive> receives;
  };

  int world(int rank) const { return ranks_[static_cast<std::size_t>(rank)]; }
  Channel channel(int source, int destination) const { return {id_, world(source), world(destination)}; }
  std::vector<int> take_arrived(Operation& operation, std::vector<std::pair<RecvPart, Message>>& taken);
  void check_life(const Operation& operation, const std::vector<int>& missing);
  void deliver(const Operation& operation, const std::vector<std::pair<RecvPart, Message>>& taken);
  TransferNote note(const Operation& operation, int world_peer) const;

  std::shared_ptr<ThreadJob> job_;
  std::vector<int> ranks_;
  int rank_;
  std::string name_;
  int id_ = 0;
  Ticket next_ticket_ = 1;
  std::map<Ticket, Operation> operations_;
};

Communicator::Ticket ThreadCommunicator::start(std::span<const SendPart> sends, std::span<const RecvPart> receives,
                                               const OpLabel& label) {
  check_host_parts(sends, receives, rank_, size(), label);
  copy_own_part(sends, receives, rank_);
  std::vector<std::pair<int, Message>> out;
  for (const SendPart& send : sends) {
    if (send.peer == rank_ || send.bytes == 0) continue;
    HostBytes bytes(send.bytes);
    std::memcpy(bytes.data(), send.data, send.bytes);
    out.emplace_back(send.peer, Message{std::move(bytes), label});
  }
  Operation operation{label, {}};
  const std::lock_guard lock(job_->mutex);
  job_->check_running_locked();
  for (auto& [peer, message] : out) {
    const Channel to = channel(rank_, peer);
    job_->mailboxes.emplace(std::pair{to, job_->sent[to]++}, std::move(message));
    job_->arrived[static_cast<std::size_t>(world(peer))].notify_all();
  }
  for (const RecvPart& receive : receives) {
    if (receive.peer == rank_ || receive.bytes == 0) continue;
    operation.receives.push_back({receive, job_->awaited[channel(receive.peer, rank_)]++});
  }
  operations_.emplace(next_ticket_, std::move(operation));
  return next_ticket_++;
}

void ThreadCommunicator::wait(Ticket ticket) {
  const auto entry = operations_.find(ticket);
  ensure(entry != operations_.end(), "{}: ticket {} was never started or has been waited for", name_, ticket);
  Operation operation = std::move(entry->second);
  operations_.erase(entry);
  std::vector<std::pair<RecvPart, Message>> taken;
  if (!operation.receives.empty()) {
    const int me = world(rank_);
    std::unique_lock lock(job_->mutex);
    job_->check_running_locked();
    const Seconds nap = std::clamp(job_->timeout_s / 16, 0.01, 0.5);
    Seconds before = now_s();
    job_->waits.begin(me, before);
    for (std::vector<int> missing; !(missing = take_arrived(operation, taken)).empty();) {
      job_->waits.await(me, missing);
      check_life(operation, missing);
      job_->arrived[static_cast<std::size_t>(me)].wait_for(lock, std::chrono::duration<double>(nap));
      job_->check_running_locked();
      // Much more time has passed than was slept: the whole process was stopped, and the wait begins anew.
      if (now_s() > before + nap + job_->timeout_s / 2) job_->waits.begin(me, now_s());
      before = now_s();
    }
    job_->waits.end(me);
  }
  deliver(operation, taken);
}

// Takes what has arrived of the operation out of the mailboxes; returns the ranks, of the world, that are still awaited.
std::vector<int> ThreadCommunicator::take_arrived(Operation& operation, std::vector<std::pair<RecvPart, Message>>& taken) {
  std::vector<int> missing;
  std::erase_if(operation.receives, [&](const Receive& receive) {
    const auto letter = job_->mailboxes.find({channel(receive.part.peer, rank_), receive.number});
    if (letter == job_->mailboxes.end()) {
      missing.push_back(world(receive.part.peer));
      return false;
    }
    taken.emplace_back(receive.part, std::move(letter->second));
    job_->mailboxes.erase(letter);
    return true;
  });
  return missing;
}

void ThreadCommunicator::check_life(const Operation& operation, const std::vector<int>& missing) {
  const int me = world(rank_);
  std::string reason;
  for (const int peer : missing) {
    if (job_->waits.finished(peer)) reason = gone_text(note(operation, peer));
  }
  const auto failed = job_->waits.failed_peer(me, now_s(), job_->timeout_s);
  if (reason.empty() && failed) reason = no_life_text(note(operation, *failed), job_->timeout_s, job_->waits.waits(*failed));
  if (reason.empty()) return;
  job_->end_locked(me, ErrorCode::kPeer, reason);
  job_->check_running_locked();
}

// Copies outside the lock; nobody else knows these messages any more.
void ThreadCommunicator::deliver(const Operation& operation, const std::vector<std::pair<RecvPart, Message>>& taken) {
  for (const auto& [part, message] : taken) {
    if (part.bytes != message.data.size()) {
      const TransferNote at{name_, size(), world(rank_), world(part.peer), false, part.bytes, operation.label};
      fail(ErrorCode::kInternal, "{}", size_mismatch_text(at, message.data.size(), label_text(message.label)));
    }
    std::memcpy(part.data, message.data.data(), part.bytes);
  }
}

TransferNote ThreadCommunicator::note(const Operation& operation, int world_peer) const {
  TransferNote text{name_, size(), world(rank_), world_peer, false, 0, operation.label};
  for (const Receive& receive : operation.receives) {
    if (world(receive.part.peer) == world_peer) text.bytes = receive.part.bytes;
  }
  return text;
}

void finish_rank(ThreadJob& job, int rank) {
  const std::lock_guard lock(job.mutex);
  job.waits.finish(rank, now_s());
  for (auto& condition : job.arrived) condition.notify_all();  // those that wait for this rank look again
}

// Runs one rank; the first exception ends the job and is kept.
void run_rank(const std::shared_ptr<ThreadJob>& job, const std::vector<int>& ranks, int rank, int threads,
              const std::function<void(Communicator&)>& body) {
  set_error_context(fmt::format("rank {}/{}", rank, ranks.size()));
  set_num_threads(threads);
  std::exception_ptr error;
  ErrorCode code = ErrorCode::kInternal;
  std::string reason;
  try {
    ThreadCommunicator world(job, ranks, rank, "world");
    body(world);
  } catch (const Error& caught) {
    error = std::current_exception();
    code = caught.code();
    reason = caught.what();
  } catch (const std::exception& caught) {
    error = std::current_exception();
    reason = caught.what();
  } catch (...) {
    error = std::current_exception();
    reason = "an exception of unknown type";
  }
  if (error) {
    const std::lock_guard lock(job->mutex);
    job->errors[static_cast<std::size_t>(rank)] = error;
    job->end_locked(rank, code, fmt::format("rank {} ended the job: {}", rank, reason));
  }
  finish_rank(*job, rank);
}

void check_job(int ranks, const CommOptions& options) {
  require(ranks >= 1, "{} ranks asked for; at least 1 is needed", ranks);
  require(options.timeout_s > 0, "comm.timeout_s is {}; it must be positive", options.timeout_s);
}

std::vector<int> all_of(int ranks) {
  std::vector<int> all(static_cast<std::size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

class SelfCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string_view name() const override { return name_; }
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    if (end_.rank >= 0) throw Error(ErrorCode::kPeer, end_.reason);
    check_parts(sends, receives, 0, 1, label);
    copy_own_part(sends, receives, 0);
    return ++tickets_;
  }
  void wait(Ticket) override {}
  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override {
    check_split(ranks, 0, 1, name);
    auto part = std::make_unique<SelfCommunicator>();
    part->name_ = name;
    return part;
  }
  void abort(const std::string& reason) noexcept override { abort(reason, ErrorCode::kPeer); }
  void abort(const std::string& reason, ErrorCode code) noexcept override { end_ = {0, code, reason}; }
  JobEnd job_end() const override { return end_; }

 private:
  std::string name_ = "world";
  Ticket tickets_ = 0;
  JobEnd end_;
};

}  // namespace

void run_thread_ranks(int ranks, const CommOptions& options, const std::function<void(Communicator&)>& body) {
  check_job(ranks, options);
  const auto job = std::make_shared<ThreadJob>(ranks, options.timeout_s);
  const std::vector<int> all = all_of(ranks);
  const int threads = std::max(1, available_cores() / ranks);
  std::vector<std::thread> running;
  for (int r = 0; r < ranks; ++r) running.emplace_back([&, r] { run_rank(job, all, r, threads, body); });
  for (std::thread& thread : running) thread.join();
  if (job->end.rank < 0) return;
  std::rotate(job->errors.begin(), job->errors.begin() + job->end.rank, job->errors.end());  // the first one first
  for (const std::exception_ptr& error : job->errors) {
    if (!error) continue;
    try {
      std::rethrow_exception(error);
    } catch (const Error& heard) {
      // A thread that watches a device may end the job before its rank meets the error, and knows the reason better.
      if (heard.code() == ErrorCode::kPeer && job->end.code != ErrorCode::kPeer) throw Error(job->end.code, job->end.reason);
      throw;
    }
  }
}

std::vector<std::unique_ptr<Communicator>> thread_worlds(int ranks, const CommOptions& options) {
  check_job(ranks, options);
  const auto job = std::make_shared<ThreadJob>(ranks, options.timeout_s);
  std::vector<std::unique_ptr<Communicator>> worlds;
  for (int rank = 0; rank < ranks; ++rank) {
    // All communicators of a rank hold its presence: when the last is gone the rank will not act again.
    const std::shared_ptr<ThreadJob> presence(job.get(), [job, rank](ThreadJob* ended) { finish_rank(*ended, rank); });
    worlds.push_back(std::make_unique<ThreadCommunicator>(presence, all_of(ranks), rank, "world"));
  }
  return worlds;
}

std::unique_ptr<Communicator> self_communicator() { return std::make_unique<SelfCommunicator>(); }

}  // namespace dattn
