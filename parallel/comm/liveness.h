// Who is alive? A wait must end when the awaited rank is dead, stopped or deadlocked, and must not end because it computes
// for long, nor because it waits, through any chain of ranks, for one that computes. One rule decides it:
//
//   activity(r) = now                                                       while r computes
//               = max(begin of its wait, activity(p) for all p it awaits)   while r waits
//   the wait of r for p fails once   now - max(begin of r's wait, activity(p)) > timeout
//
//   chain   0 -> 1 -> 2 computes:   activity(1) = activity(2) = now       nobody fails
//   cycle   0 -> 1 -> 0:            no activity after the last wait began  both fail a timeout later
//   dead    0 -> 1 (dead):          nothing is heard any more              0 fails a timeout later
//
// (In the manner of the probes of Chandy, Misra, Haas, "Distributed deadlock detection", 1983; here time is what travels.)
// WaitTable evaluates the rule where ranks share memory. PeerLiveness is one process's view, fed by small messages: a
// waiting rank asks those it awaits at every interval; they report, and pass on what they learn to those that asked, so
// that news crosses a chain of n ranks in one interval and n message times, not in n intervals.
//
// Neither reads a clock or locks: time is given, in seconds of any steady origin, and the caller holds its own lock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

namespace dattn {

using Seconds = double;

// How often ranks ask for signs of life, given the deadline.
inline Seconds life_interval(Seconds timeout) { return std::min(1.0, timeout / 8); }

class WaitTable {
 public:
  explicit WaitTable(int ranks) : ranks_(static_cast<std::size_t>(ranks)) {}

  void begin(int rank, Seconds now) { at(rank) = {State::kWaits, now, {}}; }
  void await(int rank, std::vector<int> peers) { at(rank).awaited = std::move(peers); }
  void end(int rank) { at(rank) = {}; }
  void finish(int rank, Seconds now) { at(rank) = {State::kFinished, now, {}}; }  // returned; will never act again

  bool waits(int rank) const { return at(rank).state == State::kWaits; }
  bool finished(int rank) const { return at(rank).state == State::kFinished; }

  Seconds activity(int rank, Seconds now) const {
    std::vector<bool> seen(ranks_.size());
    return search(rank, now, seen);
  }

  // The first awaited rank that has shown no activity for the timeout.
  std::optional<int> failed_peer(int rank, Seconds now, Seconds timeout) const {
    const Entry& own = at(rank);
    for (const int peer : own.awaited) {
      if (now - std::max(own.since, activity(peer, now)) > timeout) return peer;
    }
    return std::nullopt;
  }

 private:
  enum class State { kComputes, kWaits, kFinished };
  struct Entry {
    State state = State::kComputes;
    Seconds since = 0;
    std::vector<int> awaited;
  };

  Entry& at(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  const Entry& at(int rank) const { return ranks_[static_cast<std::size_t>(rank)]; }

  Seconds search(int rank, Seconds now, std::vector<bool>& seen) const {
    const Entry& entry = at(rank);
    if (entry.state == State::kComputes) return now;
    seen[static_cast<std::size_t>(rank)] = true;
    Seconds latest = entry.since;
    for (const int peer : entry.awaited) {
      if (!seen[static_cast<std::size_t>(peer)]) latest = std::max(latest, search(peer, now, seen));
    }
    return latest;
  }

  std::vector<Entry> ranks_;
};

// What a rank tells about itself: its own clock, and how long ago it, or somebody it waits for, was active. In an answer,
// `echo` is the clock that the question told.
struct LifeReport {
  Seconds clock = 0;
  Seconds age = 0;
  Seconds echo = 0;  // 0: not an answer
};

class PeerLiveness {
 public:
  PeerLiveness(int ranks, Seconds timeout)
      : timeout_(timeout), interval_(life_interval(timeout)), peers_(static_cast<std::size_t>(ranks)) {}

  // Waits of this rank, by any key that names them; `peers` are those still awaited.
  void await(std::uint64_t wait, Seconds now, std::vector<int> peers) {
    const auto [entry, fresh] = waits_.try_emplace(wait);
    if (fresh) entry->second = {now, now + interval_, {}};
    entry->second.peers = std::move(peers);
  }
  void end(std::uint64_t wait) { waits_.erase(wait); }
  // This process was stopped for a while, perhaps with the whole job: all waits begin anew.
  void forgive(Seconds now) {
    for (auto& [key, wait] : waits_) wait.begin = now;
  }

  Seconds activity(Seconds now) const {
    if (waits_.empty()) return now;
    Seconds latest = 0;
    for (const auto& [key, wait] : waits_) {
      latest = std::max(latest, wait.begin);
      for (const int peer : wait.peers) latest = std::max(latest, at(peer).activity);
    }
    return std::min(latest, now);
  }
  LifeReport report(Seconds now, Seconds echo = 0) const { return {now, now - activity(now), echo}; }

  // A report of a peer has arrived. Its age counts from the peer's clock, so that the time it spent on its way does not
  // pass for activity: news that circles in a deadlock would otherwise keep it alive for ever. The clocks are compared as
  // in NTP, by the answer with the shortest round trip (which is let go by 200 ppm, for drift).
  void heard(int peer, Seconds now, const LifeReport& report) {
    Peer& p = at(peer);
    p.heard = now;
    const Seconds trip = now - report.echo;
    if (report.echo > 0 && (!p.known || trip <= p.shortest_trip + 2e-4 * (now - p.compared))) {
      p.known = true;
      p.shortest_trip = trip;
      p.compared = now;
      p.clock_offset = (now + report.echo) / 2 - report.clock;
    }
    if (p.known) p.activity = std::max(p.activity, std::min(now, report.clock - report.age + p.clock_offset));
  }
  // Data of a peer came through: it lives.
  void moved(int peer, Seconds now) { at(peer).activity = std::max(at(peer).activity, now); }

  // A peer asks: it gets reports for a while.
  void asked(int peer, Seconds now) { at(peer).tell_until = now + 2.5 * interval_; }

  // The awaited peers to be asked now, at most once an interval each.
  std::vector<int> to_ask(Seconds now) {
    std::vector<int> peers;
    for (auto& [key, wait] : waits_) {
      if (now < wait.next_ask) continue;
      wait.next_ask = now + interval_;
      peers.insert(peers.end(), wait.peers.begin(), wait.peers.end());
    }
    return peers;
  }

  // Those that asked, when this waiting rank has news for them: activity half an interval past what it last passed on.
  std::vector<int> to_tell(Seconds now) {
    std::vector<int> peers;
    const Seconds latest = activity(now);
    if (waits_.empty() || latest < told_ + interval_ / 2) return peers;
    for (std::size_t p = 0; p < peers_.size(); ++p) {
      if (peers_[p].tell_until > now) peers.push_back(static_cast<int>(p));
    }
    told_ = latest;
    return peers;
  }

  // The first awaited rank of this wait that has shown no activity for the timeout.
  std::optional<int> failed_peer(std::uint64_t wait, Seconds now) const {
    const auto entry = waits_.find(wait);
    if (entry == waits_.end()) return std::nullopt;
    for (const int peer : entry->second.peers) {
      if (now - std::max(entry->second.begin, at(peer).activity) > timeout_) return peer;
    }
    return std::nullopt;
  }
  // It has answered lately, so it runs but waits, itself or through others, without an end.
  bool answers(int peer, Seconds now) const { return at(peer).known && now - at(peer).heard < 3 * interval_; }

  Seconds interval() const { return interval_; }
  Seconds timeout() const { return timeout_; }

 private:
  struct Peer {
    Seconds activity = 0;
    Seconds heard = 0;
    Seconds clock_offset = 0;   // ours minus the peer's
    Seconds shortest_trip = 0;  // of the answer that told it,
    Seconds compared = 0;       // at this time
    Seconds tell_until = 0;
    bool known = false;
  };
  struct Wait {
    Seconds begin = 0;
    Seconds next_ask = 0;
    std::vector<int> peers;
  };

  Peer& at(int peer) { return peers_[static_cast<std::size_t>(peer)]; }
  const Peer& at(int peer) const { return peers_[static_cast<std::size_t>(peer)]; }

  Seconds timeout_, interval_;
  Seconds told_ = 0;
  std::vector<Peer> peers_;
  std::map<std::uint64_t, Wait> waits_;
};

}  // namespace dattn
