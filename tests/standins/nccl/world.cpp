#include "tests/standins/nccl/world.h"

#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include <fmt/format.h>

namespace standin {
namespace {

// Polite waiting: yield at first, then sleep.
class Pause {
 public:
  void rest() {
    if (++rests_ < 200) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  void reset() { rests_ = 0; }

 private:
  int rests_ = 0;
};

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kPointToPoint: return "send/receive";
    case Kind::kAllGather: return "all-gather";
    case Kind::kReduceScatter: return "reduce-scatter";
    case Kind::kAllReduce: return "all-reduce";
  }
  return "?";
}

std::string text_of(const MessageHead& head) {
  return fmt::format("{} of {} elements of type {}", name_of(head.kind), head.count, head.type);
}

double number_from(const char* variable, double otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::atof(text) : otherwise;
}

}  // namespace

Fault Fault::from_environment() {
  Fault fault;
  const char* text = std::getenv("DATTN_NCCL_FAULT");
  char kind[16] = {};
  if (text != nullptr && std::sscanf(text, "%15s %d %d %lf", kind, &fault.rank, &fault.number, &fault.seconds) >= 2) {
    fault.kind = kind;
  }
  return fault;
}

World::World(std::string name, int ranks, int rank)
    : name_(std::move(name)),
      ranks_(ranks),
      rank_(rank),
      segment_(name_, ranks),
      fault_(Fault::from_environment()),
      timeout_s_(number_from("DATTN_NCCL_STANDIN_TIMEOUT_S", 120)) {
  for (auto& counts : enlisted_) counts.resize(static_cast<std::size_t>(ranks));
  for (auto& counts : finished_) counts = std::vector<std::atomic<std::uint64_t>>(static_cast<std::size_t>(ranks));
}

void World::fail(nccl::Result result, const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (state_ != nccl::kSuccess && state_ != nccl::kInProgress) return;
  error_ = why;
  state_ = result;
}

std::string World::last_error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

bool World::give_up(Clock::time_point begin, const std::string& what) {
  if (aborted_) return true;
  if (std::chrono::duration<double>(Clock::now() - begin).count() < timeout_s_) return false;
  fail(nccl::kSystemError, fmt::format("the stand-in of NCCL waited {} s: {}", timeout_s_, what));
  return true;
}

void World::join() {
  const auto begin = Clock::now();
  if (!fault_.is("absent", rank_)) segment_.join();
  for (Pause pause; !segment_.complete(); pause.rest()) {
    if (give_up(begin, "not all ranks joined")) return;
  }
}

std::optional<std::vector<std::pair<std::int64_t, std::int64_t>>> World::meet(std::int64_t a, std::int64_t b) {
  const auto begin = Clock::now();
  const std::uint64_t meeting = ++meetings_;
  auto& slots = segment_.head().slots[meeting % 2];
  Slot& own = slots[static_cast<std::size_t>(rank_)];
  own.a = a;
  own.b = b;
  own.meeting.store(meeting, std::memory_order_release);
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (std::size_t r = 0; r < static_cast<std::size_t>(ranks_); ++r) {
    for (Pause pause; slots[r].meeting.load(std::memory_order_acquire) < meeting; pause.rest()) {
      if (give_up(begin, fmt::format("rank {} did not come to a split or window", r))) return std::nullopt;
    }
    all.emplace_back(slots[r].a, slots[r].b);
  }
  return all;
}

void World::enlist(Transfer& transfer) {
  transfer.place = enlisted_[transfer.sending ? 1 : 0][static_cast<std::size_t>(transfer.peer)]++;
}

void World::run(Work& work) {
  for (const auto& step : work.before) step();
  const auto begin = Clock::now();
  Pause pause;
  while (true) {
    bool moved = false, left = false;
    for (Transfer& transfer : work.transfers) {
      if (aborted_ || state_ != nccl::kSuccess) return;
      moved |= progress(transfer);
      left |= transfer.done < sizeof(MessageHead) + transfer.bytes;
    }
    if (!left) break;
    if (moved) pause.reset();
    pause.rest();
    if (give_up(begin, "a transfer did not end")) return;
  }
  for (const auto& step : work.after) step();
}

bool World::progress(Transfer& transfer) {
  const std::size_t whole = sizeof(MessageHead) + transfer.bytes, before = transfer.done;
  auto& finished = finished_[transfer.sending ? 1 : 0][static_cast<std::size_t>(transfer.peer)];
  if (before == whole || finished != transfer.place) return false;
  Ring& ring = transfer.sending ? segment_.ring(rank_, transfer.peer) : segment_.ring(transfer.peer, rank_);
  if (transfer.sending) {
    if (before == 0 && !begin_send(transfer)) return false;
    const auto* head = reinterpret_cast<const char*>(&transfer.head);
    if (transfer.done < sizeof(MessageHead)) {
      transfer.done += ring.push(head + transfer.done, sizeof(MessageHead) - transfer.done);
    }
    if (transfer.done >= sizeof(MessageHead) && transfer.done < whole) {
      const std::size_t sent = transfer.done - sizeof(MessageHead);
      transfer.done += ring.push(transfer.data + sent, transfer.bytes - sent);
    }
  } else {
    if (before == 0) {
      if (ring.waiting() < sizeof(MessageHead)) return false;
      MessageHead found;
      transfer.done += ring.pop(reinterpret_cast<char*>(&found), sizeof found);
      if (!check_head(transfer, found)) return false;
    }
    const std::size_t got = transfer.done - sizeof(MessageHead);
    transfer.done += ring.pop(transfer.data + got, transfer.bytes - got);
  }
  if (transfer.done == whole) ++finished;
  return transfer.done > before;
}

// Counts the message and does to it what the fault says; false: nothing of it is to be pushed now.
bool World::begin_send(Transfer& transfer) {
  const int number = messages_++;
  if (fault_.number != number) return true;
  if (fault_.is("delay", rank_)) std::this_thread::sleep_for(std::chrono::duration<double>(fault_.seconds));
  if (fault_.is("hang", rank_)) std::this_thread::sleep_for(std::chrono::duration<double>(fault_.seconds));
  if (fault_.is("async", rank_)) {
    fail(nccl::kRemoteError, "an injected fault: the connection was lost");
    return false;
  }
  if (fault_.is("drop", rank_)) {
    transfer.done = sizeof(MessageHead) + transfer.bytes;
    ++finished_[1][static_cast<std::size_t>(transfer.peer)];
    return false;
  }
  return true;
}

bool World::check_head(const Transfer& transfer, const MessageHead& found) {
  const MessageHead& wanted = transfer.head;
  if (found.kind == wanted.kind && found.type == wanted.type && found.count == wanted.count) return true;
  fail(nccl::kInvalidUsage,
       fmt::format("rank {} expects {} from rank {} but finds {}", rank_, text_of(wanted), transfer.peer, text_of(found)));
  return false;
}

}  // namespace standin
