#include "parallel/comm/liveness.h"

#include <gtest/gtest.h>

namespace dattn::test {
namespace {

TEST(WaitTable, ChainBehindAComputingRankLives) {
  WaitTable table(4);
  for (int r = 0; r < 3; ++r) {
    table.begin(r, 1.0);
    table.await(r, {r + 1});
  }
  EXPECT_EQ(table.failed_peer(0, 1000.0, 5.0), std::nullopt);
  table.begin(3, 1000.0);  // now the last one waits for the first: a cycle, of which the clock starts here
  table.await(3, {0});
  EXPECT_EQ(table.failed_peer(0, 1004.9, 5.0), std::nullopt);
  EXPECT_EQ(table.failed_peer(0, 1005.1, 5.0), 1);
  EXPECT_EQ(table.failed_peer(3, 1005.1, 5.0), 0);
}

TEST(WaitTable, OneLivingPeerOfSeveralKeepsTheRankItselfAlive) {
  WaitTable table(4);
  table.begin(0, 0.0);
  table.await(0, {1, 2});  // 1 waits for ever, 2 computes
  table.begin(1, 0.0);
  table.await(1, {0});
  EXPECT_EQ(table.activity(0, 50.0), 50.0);
  EXPECT_EQ(table.failed_peer(1, 50.0, 5.0), std::nullopt);
  table.finish(2, 60.0);
  EXPECT_EQ(table.failed_peer(1, 64.0, 5.0), std::nullopt);
  EXPECT_EQ(table.failed_peer(1, 66.0, 5.0), 0);
}

// A network of ranks that exchange reports with a delay, stepped in simulated time: what an engine does.
class Network {
 public:
  Network(int ranks, Seconds timeout, Seconds delay) : delay_(delay), computes_(static_cast<std::size_t>(ranks), true) {
    for (int r = 0; r < ranks; ++r) {
      views_.emplace_back(ranks, timeout);
      skew_.push_back(1.0 + 1e4 * r);  // clocks of hosts have nothing in common
    }
  }
  void wait(int rank, std::vector<int> peers) {
    view(rank).await(1, clock(rank), std::move(peers));
    computes_[static_cast<std::size_t>(rank)] = false;
  }
  void silence(int rank) { silent_.push_back(rank); }
  Seconds now() const { return now_; }

  // Until somebody fails; returns the time, or `end`.
  Seconds run(Seconds end) {
    for (; now_ < end; now_ += 0.01) {
      for (std::size_t m = 0; m < letters_.size();) {
        if (letters_[m].due > now_) {
          ++m;
          continue;
        }
        const Letter letter = letters_[m];
        letters_.erase(letters_.begin() + static_cast<std::ptrdiff_t>(m));
        deliver(letter);
      }
      for (int r = 0; r < static_cast<int>(views_.size()); ++r) {
        if (dead(r)) continue;
        for (const int peer : view(r).to_ask(clock(r))) post(r, peer, true);
        for (const int peer : view(r).to_tell(clock(r))) post(r, peer, false);
        if (view(r).failed_peer(1, clock(r))) return now_;
      }
    }
    return end;
  }

 private:
  struct Letter {
    int from, to;
    bool asks;
    LifeReport report;
    Seconds due;
  };
  PeerLiveness& view(int rank) { return views_[static_cast<std::size_t>(rank)]; }
  Seconds clock(int rank) const { return now_ + skew_[static_cast<std::size_t>(rank)]; }
  bool dead(int rank) const { return std::find(silent_.begin(), silent_.end(), rank) != silent_.end(); }
  void post(int from, int to, bool asks, Seconds echo = 0) {
    letters_.push_back({from, to, asks, view(from).report(clock(from), echo), now_ + delay_});
  }
  void deliver(const Letter& letter) {
    if (dead(letter.to)) return;
    view(letter.to).heard(letter.from, clock(letter.to), letter.report);
    if (!letter.asks) return;
    view(letter.to).asked(letter.from, clock(letter.to));
    post(letter.to, letter.from, false, letter.report.clock);
  }

  Seconds now_ = 0;
  Seconds delay_;
  std::vector<PeerLiveness> views_;
  std::vector<Seconds> skew_;
  std::vector<bool> computes_;
  std::vector<int> silent_;
  std::vector<Letter> letters_;
};

TEST(PeerLiveness, LongChainBehindAComputingRankLives) {
  Network network(40, 4.0, 0.02);
  for (int r = 0; r < 39; ++r) network.wait(r, {r + 1});
  EXPECT_EQ(network.run(60.0), 60.0);
  network.silence(39);  // it dies
  const Seconds end = network.run(120.0);
  EXPECT_GT(end, 63.0);
  EXPECT_LT(end, 65.0);
}

TEST(PeerLiveness, CycleEndsADeadlineAfterItClosed) {
  for (const Seconds delay : {0.001, 0.05}) {
    Network network(5, 4.0, delay);
    for (int r = 0; r < 4; ++r) network.wait(r, {r + 1});
    EXPECT_EQ(network.run(20.0), 20.0);
    network.wait(4, {0});
    const Seconds end = network.run(60.0);
    EXPECT_GT(end, 23.9);
    EXPECT_LT(end, 26.0);
  }
}

TEST(PeerLiveness, CrossingCyclesEndToo) {
  Network network(6, 3.0, 0.02);
  network.wait(0, {1, 3});
  network.wait(1, {2, 0});
  network.wait(2, {0, 4});
  network.wait(3, {4, 5});
  network.wait(4, {3, 1});
  EXPECT_EQ(network.run(15.0), 15.0);  // 5 computes
  network.wait(5, {2, 0});
  const Seconds end = network.run(60.0);
  EXPECT_GT(end, 17.9);
  EXPECT_LT(end, 20.0);
}

TEST(PeerLiveness, SilentPeerFails) {
  Network network(2, 2.0, 0.01);
  network.silence(1);
  network.wait(0, {1});
  EXPECT_NEAR(network.run(10.0), 2.0, 0.1);
}

TEST(PeerLiveness, DataThatFlowsIsASignOfLife) {
  PeerLiveness view(2, 2.0);
  view.await(1, 0.0, {1});
  view.moved(1, 1.5);
  EXPECT_EQ(view.failed_peer(1, 3.0), std::nullopt);
  EXPECT_EQ(view.failed_peer(1, 3.6), 1);
}

}  // namespace
}  // namespace dattn::test
