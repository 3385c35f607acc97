#include "parallel/comm/engine.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>

#include <fmt/format.h>

#include "parallel/comm/liveness.h"
#include "parallel/comm/parts.h"

namespace dattn {
namespace {

using std::chrono::duration;

Seconds now_s() { return duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
// Linux lets a nap last 50 us longer than asked for unless a thread says that it minds: several times a short message.
void sleep_s(Seconds time) {
  [[maybe_unused]] thread_local const int precise = prctl(PR_SET_TIMERSLACK, 1000UL);
  std::this_thread::sleep_for(duration<double>(time));
}

constexpr Seconds kYieldFor = 50e-6;     // a waiting thread yields this long, then it sleeps
constexpr Seconds kLongestNap = 500e-6;  // ... this long at most
constexpr Seconds kLifeAfter = 1e-3;     // waits shorter than this are none to liveness
constexpr Seconds kBusyPause = 100e-6;   // the progress thread, while transfers are under way
constexpr Seconds kIdlePause = 5e-3;     // ... otherwise; also what a question for a sign of life waits at most
constexpr Seconds kElection = 0.1;       // ranks that fail within this time of each other agree on one reason

struct ControlHeader {
  enum Kind : std::int32_t { kAsk, kReport, kAbort };
  std::int32_t kind = kAsk;
  std::int32_t code = 0;  // kAbort
  LifeReport life;        // kAsk, kReport
};

struct Piece {
  int peer = 0;  // rank of the world
  bool sending = false;
  std::size_t bytes = 0;    // of the whole part
  std::size_t arrived = 0;  // of a part that is received
  int left = 0;             // pieces under way
  bool cut = false;
};

struct Operation {
  OpLabel label;
  std::vector<Piece> parts;
  int left = 0;  // parts under way
  std::string error;
};

class Engine {
 public:
  Engine(std::unique_ptr<Transport> transport, const CommOptions& options)
      : transport_(std::move(transport)), life_(transport_->size(), options.timeout_s), thread_([this] { run(); }) {}
  ~Engine();

  int rank() const { return transport_->rank(); }
  int size() const { return transport_->size(); }

  // Peers are ranks of the world in here.
  std::uint64_t start(std::uint32_t tag, std::span<const SendPart> sends, std::span<const RecvPart> receives,
                      const std::vector<int>& world, int own, const OpLabel& label);
  void wait(std::uint64_t ticket, std::string_view group, int group_size);

  std::uint32_t tag_of(const std::vector<int>& ranks, std::string_view name);
  void abort(const std::string& reason, ErrorCode code) noexcept;
  JobEnd end() const {
    const std::lock_guard lock(mutex_);
    return end_;
  }
  void kill_job(int exit_code) noexcept;
  void take_leave() noexcept;  // the last one out

 private:
  void run();
  void poll_locked();
  void complete_locked(const Transport::Completion& completion);
  void control_locked(int peer, const std::string& message);
  void tell_locked(int peer, ControlHeader::Kind kind, Seconds echo = 0);
  void signs_of_life_locked();
  void check_running_locked() const {
    if (end_.rank >= 0) throw Error(ErrorCode::kPeer, end_.reason);
  }
  void post_locked(std::uint64_t ticket, std::size_t part, std::uint32_t tag, const void* data);
  std::vector<int> awaited(const Operation& operation) const;
  using Words = std::function<TransferNote(const Piece&, const OpLabel&)>;
  std::string failure_locked(std::uint64_t ticket, const Operation& operation, const Words& words) const;
  void adopt_locked(int rank, ErrorCode code, const std::string& reason);

  std::unique_ptr<Transport> transport_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // for the progress thread: transfers under way, or the end
  PeerLiveness life_;
  JobEnd end_;
  std::map<std::uint64_t, Operation> operations_;
  std::uint64_t next_ticket_ = 1;
  std::unordered_map<std::uint64_t, std::pair<std::uint64_t, std::size_t>> pieces_;  // cookie -> (ticket, part)
  std::uint64_t next_cookie_ = 1;
  std::map<std::uint32_t, std::pair<std::vector<int>, std::string>> groups_;  // by tag
  std::set<int> lost_;
  Transport::Events events_;
  int waiting_ = 0;  // threads of this process that wait, and so poll
  bool stop_ = false;
  std::thread thread_;
};

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

// The progress thread.
void Engine::run() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (waiting_ == 0) poll_locked();
    const bool busy = waiting_ == 0 && !pieces_.empty();
    // A new transfer does not wake it early: the starter has polled already, and whoever needs it soon waits and polls.
    changed_.wait_for(lock, duration<double>(busy ? kBusyPause : kIdlePause));
  }
}

std::uint64_t Engine::start(std::uint32_t tag, std::span<const SendPart> sends, std::span<const RecvPart> receives,
                            const std::vector<int>& world, int own, const OpLabel& label) {
  const std::lock_guard lock(mutex_);
  check_running_locked();
  const std::uint64_t ticket = next_ticket_++;
  Operation& operation = operations_[ticket];
  operation.label = label;
  operation.parts.reserve(sends.size() + receives.size());
  const auto add = [&](int peer, bool sending, std::size_t bytes, const void* data) {
    if (peer == own || bytes == 0) return;
    operation.parts.push_back({world[static_cast<std::size_t>(peer)], sending, bytes});
    ++operation.left;
    post_locked(ticket, operation.parts.size() - 1, tag, data);
  };
  for (const RecvPart& part : receives) add(part.peer, false, part.bytes, part.data);
  for (const SendPart& part : sends) add(part.peer, true, part.bytes, part.data);
  return ticket;
}

void Engine::post_locked(std::uint64_t ticket, std::size_t index, std::uint32_t tag, const void* data) {
  Piece& part = operations_[ticket].parts[index];
  const auto* bytes = static_cast<const std::byte*>(data);
  for (std::size_t begin = 0; begin < part.bytes; begin += transport_->max_piece()) {
    const std::size_t length = std::min(transport_->max_piece(), part.bytes - begin);
    const std::uint64_t cookie = next_cookie_++;
    pieces_[cookie] = {ticket, index};
    ++part.left;
    if (part.sending) {
      transport_->send(part.peer, tag, bytes + begin, length, cookie);
    } else {
      transport_->receive(part.peer, tag, const_cast<std::byte*>(bytes) + begin, length, cookie);
    }
  }
}

void Engine::wait(std::uint64_t ticket, std::string_view group, int group_size) {
  const auto words = [&](const Piece& part, const OpLabel& label) {
    return TransferNote{group, group_size, rank(), part.peer, part.sending, part.bytes, label};
  };
  std::unique_lock lock(mutex_);
  const auto entry = operations_.find(ticket);
  ensure(entry != operations_.end(), "ticket {} was never started or has been waited for", ticket);
  Operation& operation = entry->second;
  const Seconds begin = now_s();
  Seconds previous = begin;
  int left = -1;
  ++waiting_;
  std::string failure;
  while (true) {
    poll_locked();
    if (end_.rank >= 0 || operation.left == 0) break;
    const Seconds now = now_s();
    if (now - previous > life_.interval()) life_.forgive(now);  // this process was stopped itself, and so may all have been
    previous = now;
    if (now - begin > kLifeAfter) {
      if (operation.left != left) life_.await(ticket, begin, awaited(operation));
      left = operation.left;
      failure = failure_locked(ticket, operation, words);
      if (!failure.empty()) break;
    }
    lock.unlock();
    if (now - begin < kYieldFor) {
      sched_yield();
    } else {
      sleep_s(std::min((now - begin) / 8, kLongestNap));
    }
    lock.lock();
  }
  --waiting_;
  life_.end(ticket);
  if (!failure.empty()) {
    lock.unlock();
    abort(failure, ErrorCode::kPeer);
    lock.lock();
  }
  check_running_locked();
  const Operation finished = std::move(operation);
  operations_.erase(entry);
  lock.unlock();
  for (const Piece& part : finished.parts) {
    if (part.sending || (!part.cut && part.arrived == part.bytes)) continue;
    std::string text = size_mismatch_text(words(part, finished.label), part.arrived, "");
    if (part.cut) text += " (it sent more than was awaited)";
    throw Error(ErrorCode::kInternal, text);
  }
}

std::vector<int> Engine::awaited(const Operation& operation) const {
  std::vector<int> peers;
  for (const Piece& part : operation.parts) {
    if (part.left > 0) peers.push_back(part.peer);
  }
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  return peers;
}

// Why this wait cannot end, or nothing.
std::string Engine::failure_locked(std::uint64_t ticket, const Operation& operation, const Words& words) const {
  const auto part_of = [&](int peer) {
    return *std::find_if(operation.parts.begin(), operation.parts.end(),
                         [&](const Piece& part) { return part.left > 0 && part.peer == peer; });
  };
  if (!operation.error.empty()) return operation.error;
  for (const Piece& part : operation.parts) {
    if (part.left > 0 && lost_.contains(part.peer)) return gone_text(words(part, operation.label));
  }
  const Seconds now = now_s();
  const auto failed = life_.failed_peer(ticket, now);
  if (!failed) return {};
  return no_life_text(words(part_of(*failed), operation.label), life_.timeout(), life_.answers(*failed, now));
}

// After the end nothing is completed any more: the memory may be gone.
void Engine::poll_locked() {
  if (stop_) return;
  events_.completions.clear();
  events_.controls.clear();
  events_.moving.clear();
  transport_->poll(events_);
  for (const auto& control : events_.controls) control_locked(control.peer, control.message);
  for (const int peer : events_.lost) lost_.insert(peer);
  const Seconds now = now_s();
  for (const int peer : events_.moving) life_.moved(peer, now);
  if (end_.rank >= 0) return;
  for (const auto& completion : events_.completions) complete_locked(completion);
  signs_of_life_locked();
}

void Engine::complete_locked(const Transport::Completion& completion) {
  const auto place = pieces_.find(completion.cookie);
  if (place == pieces_.end()) return;
  const auto [ticket, index] = place->second;
  pieces_.erase(place);
  const auto entry = operations_.find(ticket);
  if (entry == operations_.end()) return;
  Operation& operation = entry->second;
  Piece& part = operation.parts[index];
  part.arrived += completion.bytes;
  part.cut |= completion.cut;
  life_.moved(part.peer, now_s());
  if (!completion.error.empty()) {
    operation.error = fmt::format("the transfer {} rank {} failed: {} ({}, {} bytes)", part.sending ? "to" : "from", part.peer,
                                  completion.error, label_text(operation.label), part.bytes);
  }
  if (--part.left == 0) --operation.left;
}

void Engine::control_locked(int peer, const std::string& message) {
  ControlHeader header;
  if (message.size() < sizeof header) return;
  std::memcpy(&header, message.data(), sizeof header);
  const Seconds now = now_s();
  if (header.kind == ControlHeader::kAbort) {
    adopt_locked(peer, static_cast<ErrorCode>(header.code), message.substr(sizeof header));
    return;
  }
  life_.heard(peer, now, header.life);
  if (header.kind == ControlHeader::kAsk) {
    life_.asked(peer, now);
    tell_locked(peer, ControlHeader::kReport, header.life.clock);
  }
}

void Engine::tell_locked(int peer, ControlHeader::Kind kind, Seconds echo) {
  ControlHeader header;
  header.kind = kind;
  header.life = life_.report(now_s(), echo);
  transport_->send_control(peer, {reinterpret_cast<const char*>(&header), sizeof header});
}

void Engine::signs_of_life_locked() {
  const Seconds now = now_s();
  for (const int peer : life_.to_ask(now)) tell_locked(peer, ControlHeader::kAsk);
  for (const int peer : life_.to_tell(now)) tell_locked(peer, ControlHeader::kReport);
}

// Of several ranks that end the job at the same time, the lowest is the one that counts.
void Engine::adopt_locked(int by, ErrorCode code, const std::string& reason) {
  if (end_.rank >= 0 && end_.rank <= by) return;
  if (end_.rank < 0) transport_->cancel();
  end_ = {by, code, reason};
}

void Engine::abort(const std::string& reason, ErrorCode code) noexcept {
  try {
    std::unique_lock lock(mutex_);
    if (end_.rank >= 0) return;
    adopt_locked(rank(), code, reason);
    ControlHeader header;
    header.kind = ControlHeader::kAbort;
    header.code = static_cast<std::int32_t>(code);
    std::string message(reinterpret_cast<const char*>(&header), sizeof header);
    message += reason.substr(0, Transport::kControlBytes - sizeof header);
    for (int peer = 0; peer < size(); ++peer) {
      if (peer != rank()) transport_->send_control(peer, message);
    }
    for (const Seconds until = now_s() + kElection; now_s() < until;) {
      poll_locked();
      lock.unlock();
      sleep_s(1e-3);
      lock.lock();
    }
  } catch (...) {
    // Best effort: the others have their deadlines.
  }
}

std::uint32_t Engine::tag_of(const std::vector<int>& ranks, std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  const auto mix = [&](std::uint64_t value) {
    for (int i = 0; i < 8; ++i, value >>= 8) hash = (hash ^ (value & 0xff)) * 0x100000001b3u;
  };
  for (const int r : ranks) mix(static_cast<std::uint64_t>(r));
  for (const char c : name) mix(static_cast<unsigned char>(c));
  const auto tag = static_cast<std::uint32_t>((hash ^ (hash >> 32)) % transport_->tags());
  const std::lock_guard lock(mutex_);
  const auto [entry, fresh] = groups_.try_emplace(tag, ranks, std::string(name));
  ensure(fresh || (entry->second.first == ranks && entry->second.second == name),
         "groups '{}' of {} ranks and '{}' of {} ranks have the same tag {}; give one another name", name, ranks.size(),
         entry->second.second, entry->second.first.size(), tag);
  return tag;
}

void Engine::kill_job(int exit_code) noexcept {
  const std::lock_guard lock(mutex_);
  transport_->kill_job(exit_code);
}

void Engine::take_leave() noexcept {
  const std::lock_guard lock(mutex_);
  const bool clean = end_.rank < 0 && pieces_.empty();
  adopt_locked(rank(), ErrorCode::kInternal, "the world communicator is gone; keep it longer than its parts");
  transport_->shutdown(clean);
  stop_ = true;
  changed_.notify_all();
}

class EngineCommunicator : public Communicator {
 public:
  EngineCommunicator(std::shared_ptr<Engine> engine, std::vector<int> ranks, int rank, std::string name)
      : engine_(std::move(engine)), ranks_(std::move(ranks)), rank_(rank), name_(std::move(name)) {
    tag_ = engine_->tag_of(ranks_, name_);
  }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  std::string_view name() const override { return name_; }

  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    check_host_parts(sends, receives, rank_, size(), label);
    copy_own_part(sends, receives, rank_);
    return engine_->start(tag_, sends, receives, ranks_, rank_, label);
  }
  void wait(Ticket ticket) override { engine_->wait(ticket, name_, size()); }
  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view name) override {
    const int place = check_split(ranks, rank_, size(), name);
    std::vector<int> members;
    for (const int r : ranks) members.push_back(ranks_[static_cast<std::size_t>(r)]);
    return std::make_unique<EngineCommunicator>(engine_, std::move(members), place, std::string(name));
  }
  void abort(const std::string& reason) noexcept override { engine_->abort(reason, ErrorCode::kPeer); }
  void abort(const std::string& reason, ErrorCode code) noexcept override { engine_->abort(reason, code); }
  JobEnd job_end() const override { return engine_->end(); }
  void terminate_job(int exit_code) noexcept override { engine_->kill_job(exit_code); }

 protected:
  std::shared_ptr<Engine> engine_;
  std::vector<int> ranks_;
  int rank_;
  std::string name_;
  std::uint32_t tag_ = 0;
};

// The world takes leave of the other ranks when it goes: a barrier with a deadline, so that the end of MPI, which has
// none, finds everybody there.
class EngineWorld final : public EngineCommunicator {
 public:
  EngineWorld(const std::shared_ptr<Engine>& engine, std::vector<int> ranks)
      : EngineCommunicator(engine, std::move(ranks), engine->rank(), "world") {}
  ~EngineWorld() override {
    try {
      if (std::uncaught_exceptions() > 0) {
        abort("a rank left the job by an exception");
      } else if (job_end().rank < 0) {
        barrier({.verb = "leave"});
      }
    } catch (...) {
      // The barrier has ended the job with its reason.
    }
    engine_->take_leave();
  }
};

}  // namespace

std::unique_ptr<Communicator> engine_world(std::unique_ptr<Transport> transport, const CommOptions& options) {
  require(options.timeout_s > 0, "comm.timeout_s is {}; it must be positive", options.timeout_s);
  std::vector<int> ranks;
  for (int r = 0; r < transport->size(); ++r) ranks.push_back(r);
  return std::make_unique<EngineWorld>(std::make_shared<Engine>(std::move(transport), options), std::move(ranks));
}

}  // namespace dattn
