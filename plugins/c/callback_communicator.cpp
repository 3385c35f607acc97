#include "plugins/c/callback_communicator.h"

#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "core/base/error.h"
#include "parallel/comm/parts.h"

namespace dattn::c {
namespace {

// What all groups of a rank share.
struct Host {
  Host(const dattn_callbacks& table, double seconds) : callbacks(table), timeout_s(seconds) {}
  ~Host() {
    if (callbacks.release != nullptr) callbacks.release(callbacks.user);
  }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  std::string error() const {
    const char* text = callbacks.error != nullptr ? callbacks.error(callbacks.user) : nullptr;
    return text != nullptr && *text != '\0' ? text : "the host's callback gave no reason";
  }

  const dattn_callbacks callbacks;
  const double timeout_s;
  JobEnd end;
};

// FNV-1a over the group's ranks and name, below 2^30: the same on all of its ranks, without asking them.
std::uint32_t tag_of(std::span<const int> ranks, std::string_view name) {
  std::uint32_t hash = 2166136261u;
  const auto add = [&](std::uint32_t value) { hash = (hash ^ value) * 16777619u; };
  for (const int rank : ranks) add(static_cast<std::uint32_t>(rank));
  for (const char letter : name) add(static_cast<unsigned char>(letter));
  return hash & 0x3fffffffu;
}

class CallbackCommunicator final : public Communicator {
 public:
  CallbackCommunicator(std::shared_ptr<Host> host, std::vector<int> ranks, int rank, std::string name)
      : host_(std::move(host)), ranks_(std::move(ranks)), rank_(rank), name_(std::move(name)), tag_(tag_of(ranks_, name_)) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  std::string_view name() const override { return name_; }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    check_running();
    check_parts(sends, receives, rank_, size(), label);
    copy_own_part(sends, receives, rank_);
    std::vector<dattn_part> out, in;
    for (const SendPart& send : sends) {
      if (send.peer != rank_ && send.bytes > 0) out.push_back({world(send.peer), const_cast<void*>(send.data), send.bytes});
    }
    for (const RecvPart& receive : receives) {
      if (receive.peer != rank_ && receive.bytes > 0) in.push_back({world(receive.peer), receive.data, receive.bytes});
    }
    Running running{label, nullptr, out.empty() && in.empty()};
    if (!running.empty) {
      const dattn_callbacks& host = host_->callbacks;
      if (host.start(host.user, tag_, out.data(), static_cast<int>(out.size()), in.data(), static_cast<int>(in.size()),
                     &running.request) != 0) {
        end_job("starting", label, out, in);
      }
    }
    running_.emplace(next_, running);
    return next_++;
  }

  void wait(Ticket ticket) override {
    const auto entry = running_.find(ticket);
    ensure(entry != running_.end(), "{}: ticket {} was never started or has been waited for", name_, ticket);
    const Running running = entry->second;
    running_.erase(entry);
    check_running();
    if (running.empty) return;
    const dattn_callbacks& host = host_->callbacks;
    if (host.wait(host.user, running.request, host_->timeout_s) != 0) end_job("waiting for", running.label, {}, {});
  }

  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override {
    const int place = check_split(ranks, rank_, size(), name);
    std::vector<int> members;
    for (const int rank : ranks) members.push_back(world(rank));
    return std::make_unique<CallbackCommunicator>(host_, std::move(members), place, std::string(name));
  }

  void abort(const std::string& reason) noexcept override { abort(reason, ErrorCode::kPeer); }
  void abort(const std::string& reason, ErrorCode code) noexcept override {
    if (host_->end.rank >= 0) return;
    host_->end = {world(rank_), code, reason};
    if (host_->callbacks.abort != nullptr) host_->callbacks.abort(host_->callbacks.user, reason.c_str());
  }
  JobEnd job_end() const override { return host_->end; }

 private:
  struct Running {
    OpLabel label;
    void* request = nullptr;
    bool empty = false;
  };

  int world(int rank) const { return ranks_[static_cast<std::size_t>(rank)]; }

  void check_running() const {
    if (host_->end.rank >= 0) throw Error(ErrorCode::kPeer, host_->end.reason);
  }

  [[noreturn]] void end_job(std::string_view doing, const OpLabel& label, const std::vector<dattn_part>& sends,
                            const std::vector<dattn_part>& receives) {
    std::string parts;
    for (const dattn_part& part : sends) parts += fmt::format(", {} bytes to rank {}", part.bytes, part.peer);
    for (const dattn_part& part : receives) parts += fmt::format(", {} bytes from rank {}", part.bytes, part.peer);
    const std::string reason =
        fmt::format("{} a transfer of group {} ({}{}) failed: {}", doing, name_, label_text(label), parts, host_->error());
    abort(reason);
    throw Error(ErrorCode::kPeer, reason);
  }

  std::shared_ptr<Host> host_;
  std::vector<int> ranks_;  // of the world
  int rank_;
  std::string name_;
  std::uint32_t tag_;
  Ticket next_ = 1;
  std::unordered_map<Ticket, Running> running_;
};

}  // namespace

std::unique_ptr<Communicator> callback_world(const dattn_callbacks& callbacks, const CommOptions& options) {
  require(callbacks.start != nullptr && callbacks.wait != nullptr, "dattn_callbacks: start and wait must be given");
  require(callbacks.size >= 1 && callbacks.rank >= 0 && callbacks.rank < callbacks.size,
          "dattn_callbacks: rank {} of {} ranks; ranks are numbered from 0", callbacks.rank, callbacks.size);
  require(options.timeout_s > 0, "dattn_comm_options.timeout_s is {}; it must be positive", options.timeout_s);
  std::vector<int> everyone(static_cast<std::size_t>(callbacks.size));
  std::iota(everyone.begin(), everyone.end(), 0);
  return std::make_unique<CallbackCommunicator>(std::make_shared<Host>(callbacks, options.timeout_s), std::move(everyone),
                                                callbacks.rank, "world");
}

}  // namespace dattn::c
