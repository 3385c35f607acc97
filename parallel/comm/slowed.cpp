#include "parallel/comm/slowed.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <numeric>
#include <thread>
#include <unordered_map>

#include <fmt/format.h>

#include "parallel/comm/decorator.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::duration::rep;  // since the clock's epoch

// The ways of one rank and when each is free, shared by all its groups.
struct Ways {
  std::mutex mutex;
  Time out = 0;
  Time in = 0;
};

Time now() { return Clock::now().time_since_epoch().count(); }

class Slowed final : public Decorator {
 public:
  Slowed(std::unique_ptr<Communicator> inner, const SlowLink& link, std::shared_ptr<Ways> ways)
      : Decorator(std::move(inner)), link_(link), ways_(std::move(ways)) {
    std::vector<int> all(static_cast<std::size_t>(size()));
    std::iota(all.begin(), all.end(), 0);
    stamps_ = inner_->split(all, fmt::format("{} stamps", name()));
  }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    Transfer transfer;
    transfer.started = now();
    transfer.begins.resize(sends.size());
    for (const std::size_t i : in_rounds(sends, 1)) {
      const auto [begin, end] = pass(ways_->out, transfer.started, sends[i].bytes);
      transfer.begins[i] = begin;
      transfer.left = std::max(transfer.left, end);
    }
    for (const std::size_t i : in_rounds(receives, -1)) transfer.arrivals.push_back({receives[i].peer, receives[i].bytes});
    std::vector<SendPart> stamps_out;
    std::vector<RecvPart> stamps_in;
    for (std::size_t i = 0; i < sends.size(); ++i) {
      if (crosses(sends[i])) stamps_out.push_back({sends[i].peer, &transfer.begins[i], sizeof(Time)});
    }
    for (Arrival& arrival : transfer.arrivals) stamps_in.push_back({arrival.peer, &arrival.begin, sizeof(Time)});
    const Ticket ticket = inner_->start(sends, receives, label);
    transfer.stamps = stamps_->start(stamps_out, stamps_in, label);
    const std::lock_guard lock(mutex_);
    running_.insert_or_assign(ticket, std::move(transfer));  // the stamps stay where they are
    return ticket;
  }

  void wait(Ticket ticket) override {
    auto entry = [&] {
      const std::lock_guard lock(mutex_);
      return running_.extract(ticket);
    }();
    if (entry.empty()) return inner_->wait(ticket);
    Transfer& transfer = entry.mapped();
    stamps_->wait(transfer.stamps);
    inner_->wait(ticket);
    Time ended = transfer.left;
    for (const Arrival& arrival : transfer.arrivals) {
      const auto passage = pass(ways_->in, std::max(arrival.begin, transfer.started), arrival.bytes);
      ended = std::max(ended, passage.second + ticks(link_.latency_s));
    }
    std::this_thread::sleep_until(Clock::time_point(Clock::duration(ended)));
  }

 private:
  std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const override {
    return std::make_unique<Slowed>(std::move(part), link_, ways_);
  }
  struct Arrival {
    int peer = 0;
    std::size_t bytes = 0;
    Time begin = 0;  // what the sender says
  };
  struct Transfer {
    Time started = 0, left = 0;
    std::vector<Time> begins;  // of sends
    std::vector<Arrival> arrivals;
    Ticket stamps = 0;
  };

  template <class Part>
  bool crosses(const Part& part) const {
    return part.peer != rank() && part.bytes > 0;
  }

  // The parts that cross the link, the peer one further along the group first, so that ranks of a group that all send to
  // all do not queue for the same way in.
  template <class Part>
  std::vector<std::size_t> in_rounds(std::span<const Part> parts, int direction) const {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (crosses(parts[i])) order.push_back(i);
    }
    const auto round = [&](std::size_t i) { return (direction * (parts[i].peer - rank()) + size()) % size(); };
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return round(a) < round(b); });
    return order;
  }

  static Time ticks(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)).count();
  }

  // Takes a way for a message that may begin at `ready`; returns when it begins and ends.
  std::pair<Time, Time> pass(Time& way, Time ready, std::size_t bytes) {
    const std::lock_guard lock(ways_->mutex);
    const Time begin = std::max(ready, way);
    way = begin + ticks(static_cast<double>(bytes) / link_.bandwidth);
    return {begin, way};
  }

  SlowLink link_;
  std::shared_ptr<Ways> ways_;
  std::unique_ptr<Communicator> stamps_;
  std::mutex mutex_;
  std::unordered_map<Ticket, Transfer> running_;
};

}  // namespace

std::unique_ptr<Communicator> slowed(std::unique_ptr<Communicator> inner, const SlowLink& link) {
  require(link.latency_s >= 0 && link.bandwidth > 0,
          "a slowed link of latency {} s and bandwidth {} bytes/s; use a latency >= 0 and a bandwidth > 0", link.latency_s,
          link.bandwidth);
  return std::make_unique<Slowed>(std::move(inner), link, std::make_shared<Ways>());
}

}  // namespace dattn
