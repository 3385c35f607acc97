#include "parallel/comm/decorators.h"

#include <chrono>
#include <functional>
#include <thread>
#include <unordered_map>

#include <fmt/format.h>

#include "parallel/comm/decorator.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

// What a rank moves, without what goes to oneself.
struct Payload {
  std::int64_t received = 0;
  std::int64_t sent = 0;

  explicit Payload(std::int64_t both) : received(both), sent(both) {}
  Payload(std::span<const SendPart> sends, std::span<const RecvPart> receives, int rank) {
    for (const SendPart& part : sends) sent += part.peer == rank ? 0 : static_cast<std::int64_t>(part.bytes);
    for (const RecvPart& part : receives) received += part.peer == rank ? 0 : static_cast<std::int64_t>(part.bytes);
  }
};

// Sees exchanges, and the collectives that the back end does by itself: those as if the ranks were a ring, in which n bytes of
// P ranks take n (P-1)/P, and twice that where they are summed for all.
class Observer : public Decorator {
 public:
  using Decorator::Decorator;

  void all_reduce_sum(const TensorView& data, const OpLabel& label) override {
    if (!has_native(Collective::kAllReduceSum, data, {})) return Communicator::all_reduce_sum(data, label);
    observe(label, Payload(2 * in_a_ring(data)), [&] { inner_->all_reduce_sum(data, label); });
  }
  void all_gather(const TensorView& all, std::span<const std::int64_t> counts, const OpLabel& label) override {
    if (!has_native(Collective::kAllGather, all, counts)) return Communicator::all_gather(all, counts, label);
    observe(label, Payload(in_a_ring(all)), [&] { inner_->all_gather(all, counts, label); });
  }
  void reduce_scatter_sum(const TensorView& all, std::span<const std::int64_t> counts, const TensorView& own,
                          const OpLabel& label) override {
    if (!has_native(Collective::kReduceScatterSum, all, counts))
      return Communicator::reduce_scatter_sum(all, counts, own, label);
    observe(label, Payload(in_a_ring(all)), [&] { inner_->reduce_scatter_sum(all, counts, own, label); });
  }
  bool has_native(Collective call, const TensorView& data, std::span<const std::int64_t> counts) const override {
    return inner_->has_native(call, data, counts);
  }

 protected:
  virtual void observe(const OpLabel& label, const Payload& payload, const std::function<void()>& call) = 0;

 private:
  std::int64_t in_a_ring(const TensorView& data) const { return data.bytes() * (size() - 1) / size(); }
};

class Counted final : public Observer {
 public:
  Counted(std::unique_ptr<Communicator> inner, std::shared_ptr<ByteCounter> counter)
      : Observer(std::move(inner)), counter_(std::move(counter)) {}
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    const Payload payload(sends, receives, rank());
    const Ticket ticket = inner_->start(sends, receives, label);
    counter_->count(label.verb, payload.received, payload.sent);
    return ticket;
  }

 private:
  void observe(const OpLabel& label, const Payload& payload, const std::function<void()>& call) override {
    call();
    counter_->count(label.verb, payload.received, payload.sent);
  }
  std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const override {
    return counted(std::move(part), counter_);
  }
  std::shared_ptr<ByteCounter> counter_;
};

class Traced final : public Observer {
 public:
  Traced(std::unique_ptr<Communicator> inner, std::shared_ptr<Trace> trace)
      : Observer(std::move(inner)), trace_(std::move(trace)) {}
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    const Payload payload(sends, receives, rank());
    const double begin = trace_->now_us();
    const Ticket ticket = inner_->start(sends, receives, label);
    const std::lock_guard lock(mutex_);
    running_.insert_or_assign(ticket, Running{std::string(label.verb), begin, arguments_of(label, payload)});
    return ticket;
  }
  void wait(Ticket ticket) override {
    const double begin = trace_->now_us();
    inner_->wait(ticket);
    const double end = trace_->now_us();
    const std::lock_guard lock(mutex_);
    const auto entry = running_.find(ticket);
    if (entry == running_.end()) return;
    const Running& running = entry->second;
    trace_->span(fmt::format("comm {}", name()), running.verb, running.begin_us, end, running.arguments);
    trace_->span("exposed communication", running.verb, begin, end, running.arguments);
    running_.erase(entry);
  }
  Trace* trace() const override { return trace_.get(); }

 private:
  void observe(const OpLabel& label, const Payload& payload, const std::function<void()>& call) override {
    const double begin = trace_->now_us();
    call();
    trace_->span(fmt::format("comm {}", name()), label.verb, begin, trace_->now_us(), arguments_of(label, payload));
  }
  static std::string arguments_of(const OpLabel& label, const Payload& payload) {
    return fmt::format(R"({{"layer":{},"step":{},"received":{},"sent":{}}})", label.layer, label.step, payload.received,
                       payload.sent);
  }
  std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const override {
    return traced(std::move(part), trace_);
  }
  struct Running {
    std::string verb;
    double begin_us = 0;
    std::string arguments;
  };
  std::shared_ptr<Trace> trace_;
  std::mutex mutex_;
  std::unordered_map<Ticket, Running> running_;
};

class Faulty final : public Decorator {
 public:
  Faulty(std::unique_ptr<Communicator> inner, const Fault& fault, std::shared_ptr<std::atomic<std::int64_t>> starts)
      : Decorator(std::move(inner)), fault_(fault), starts_(std::move(starts)) {}
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    if (starts_->fetch_add(1) != fault_.at) return inner_->start(sends, receives, label);
    if (fault_.kind == Fault::Kind::kKill) {
      fail(ErrorCode::kPeer, "killed by an injected fault at start {} ({})", fault_.at, label_text(label));
    }
    if (fault_.kind == Fault::Kind::kDelay) std::this_thread::sleep_for(std::chrono::duration<double>(fault_.delay_s));
    std::vector<SendPart> made(sends.begin(), sends.end());
    if (fault_.kind == Fault::Kind::kDrop) std::erase_if(made, [this](const SendPart& part) { return part.peer != rank(); });
    return inner_->start(made, receives, label);
  }

 private:
  std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const override {
    return std::make_unique<Faulty>(std::move(part), fault_, starts_);
  }
  Fault fault_;
  std::shared_ptr<std::atomic<std::int64_t>> starts_;
};

}  // namespace

void ByteCounter::count(std::string_view verb, std::int64_t received, std::int64_t sent) {
  const std::lock_guard lock(mutex_);
  auto entry = counts_.find(verb);
  if (entry == counts_.end()) entry = counts_.emplace(verb, ByteCounts{}).first;
  entry->second.received += received;
  entry->second.sent += sent;
  ++entry->second.operations;
}

std::map<std::string, ByteCounts> ByteCounter::by_verb() const {
  const std::lock_guard lock(mutex_);
  return {counts_.begin(), counts_.end()};
}

ByteCounts ByteCounter::total() const {
  ByteCounts sum;
  for (const auto& [verb, counts] : by_verb()) {
    sum.received += counts.received;
    sum.sent += counts.sent;
    sum.operations += counts.operations;
  }
  return sum;
}

void ByteCounter::reset() {
  const std::lock_guard lock(mutex_);
  counts_.clear();
}

std::unique_ptr<Communicator> counted(std::unique_ptr<Communicator> inner, std::shared_ptr<ByteCounter> counter) {
  return std::make_unique<Counted>(std::move(inner), std::move(counter));
}

std::unique_ptr<Communicator> traced(std::unique_ptr<Communicator> inner, std::shared_ptr<Trace> trace) {
  return std::make_unique<Traced>(std::move(inner), std::move(trace));
}

std::unique_ptr<Communicator> faulty(std::unique_ptr<Communicator> inner, const Fault& fault) {
  return std::make_unique<Faulty>(std::move(inner), fault, std::make_shared<std::atomic<std::int64_t>>(0));
}

}  // namespace dattn
