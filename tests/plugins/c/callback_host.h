// A host program that carries messages for dattn: mailboxes between threads, with a deadline, and faults on demand.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "tests/plugins/c/fixture.h"

namespace dattn::test {

class CallbackHost {
 public:
  explicit CallbackHost(int ranks) : ranks_(static_cast<std::size_t>(ranks)) {
    for (std::size_t r = 0; r < ranks_.size(); ++r) ranks_[r] = {this, static_cast<int>(r), {}};
  }

  std::vector<dattn_comm*> comms(dattn_context* context, double timeout_s = 20) {
    std::vector<dattn_comm*> made;
    for (Rank& rank : ranks_) {
      auto callbacks = sized<dattn_callbacks>();
      callbacks.user = &rank;
      callbacks.rank = rank.number;
      callbacks.size = static_cast<int>(ranks_.size());
      callbacks.start = start;
      callbacks.wait = wait;
      callbacks.error = [](void* user) { return static_cast<Rank*>(user)->error.c_str(); };
      callbacks.abort = [](void* user, const char*) { ++static_cast<Rank*>(user)->host->aborts_; };
      callbacks.release = [](void* user) { ++static_cast<Rank*>(user)->host->released_; };
      auto options = sized<dattn_comm_options>();
      options.timeout_s = timeout_s;
      dattn_comm* comm = nullptr;
      EXPECT_EQ(dattn_comm_callbacks(context, &callbacks, &options, &comm), DATTN_OK) << dattn_last_error();
      made.push_back(comm);
    }
    return made;
  }
  void lose(int rank) { lost_ = rank; }  // its messages do not arrive any more
  int released() const { return released_; }
  int aborts() const { return aborts_; }

 private:
  struct Rank {
    CallbackHost* host = nullptr;
    int number = 0;
    std::string error;
  };
  using Channel = std::tuple<std::uint32_t, int, int>;  // tag, source, destination
  struct Receive {
    Channel channel;
    std::size_t place = 0;  // of the message in its channel
    dattn_part part{};
  };

  static int start(void* user, std::uint32_t tag, const dattn_part* sends, std::int32_t send_count, const dattn_part* receives,
                   std::int32_t receive_count, void** request) {
    Rank& rank = *static_cast<Rank*>(user);
    CallbackHost& host = *rank.host;
    const std::lock_guard lock(host.mutex_);
    for (int i = 0; i < send_count; ++i) {
      if (host.lost_ == rank.number) continue;
      const char* bytes = static_cast<const char*>(sends[i].data);
      host.sent_[{tag, rank.number, sends[i].peer}].emplace_back(bytes, bytes + sends[i].bytes);
    }
    auto* wanted = new std::vector<Receive>;
    for (int i = 0; i < receive_count; ++i) {
      const Channel channel{tag, receives[i].peer, rank.number};
      wanted->push_back({channel, host.awaited_[channel]++, receives[i]});
    }
    host.changed_.notify_all();
    *request = wanted;
    return 0;
  }

  static int wait(void* user, void* request, double timeout_s) {
    Rank& rank = *static_cast<Rank*>(user);
    CallbackHost& host = *rank.host;
    const std::unique_ptr<std::vector<Receive>> wanted(static_cast<std::vector<Receive>*>(request));
    std::unique_lock lock(host.mutex_);
    for (const Receive& receive : *wanted) {
      const auto there = [&] { return host.sent_[receive.channel].size() > receive.place; };
      if (!host.changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), there)) {
        rank.error = "nothing came from rank " + std::to_string(receive.part.peer);
        return 1;
      }
      const std::vector<char>& message = host.sent_[receive.channel][receive.place];
      if (message.size() != receive.part.bytes) {
        rank.error = "a message of another length";
        return 1;
      }
      std::memcpy(receive.part.data, message.data(), message.size());
    }
    return 0;
  }

  std::vector<Rank> ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Channel, std::vector<std::vector<char>>> sent_;
  std::map<Channel, std::size_t> awaited_;
  int lost_ = -1;
  std::atomic<int> released_{0}, aborts_{0};
};

}  // namespace dattn::test
