// The TCP transport. On a connection travel messages, each a header and its bytes. A message whose receive has been posted
// is read straight into place; one that comes early is kept until the receive is posted.
#include "parallel/comm/tcp.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <thread>

#include "core/base/error.h"
#include "parallel/comm/engine.h"
#include "parallel/comm/tcp_connect.h"

namespace dattn {
namespace {

struct Header {
  std::uint32_t tag = 0;
  std::uint32_t control = 0;
  std::uint64_t bytes = 0;
};

struct Outgoing {
  Header header;
  const char* data = nullptr;
  std::string owned;  // control messages, and what is left of a transfer after a failure
  std::uint64_t cookie = 0;
  std::size_t done = 0;  // of header and data together
};

struct Posted {
  char* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t cookie = 0;
};

struct Early {
  std::string data;
  bool complete = false;
};

// One connection and what is under way on it.
struct Link {
  Socket socket;
  bool lost = false;
  std::deque<Outgoing> out;
  std::map<std::uint32_t, std::deque<Posted>> posted;
  std::map<std::uint32_t, std::deque<Early>> early;
  // The message that is arriving.
  Header header;
  std::size_t header_done = 0;
  std::size_t body_done = 0;
  std::optional<Posted> direct;  // read into place; otherwise to the last early one of its tag, or to `control`
  std::string control;
};

class TcpTransport final : public Transport {
 public:
  TcpTransport(const TcpJob& job, double timeout_s) : job_(job), links_(static_cast<std::size_t>(job.size)) {
    auto sockets = connect_all(job, timeout_s);
    for (std::size_t r = 0; r < sockets.size(); ++r) links_[r].socket = std::move(sockets[r]);
  }

  int rank() const override { return job_.rank; }
  int size() const override { return job_.size; }
  std::uint32_t tags() const override { return 0xffffffffu; }
  std::size_t max_piece() const override { return std::size_t{64} << 20; }

  void send(int peer, std::uint32_t tag, const void* data, std::size_t bytes, std::uint64_t cookie) override {
    link(peer).out.push_back({{tag, 0, bytes}, static_cast<const char*>(data), {}, cookie, 0});
    write_some(peer, later_);
  }
  void receive(int peer, std::uint32_t tag, void* data, std::size_t bytes, std::uint64_t cookie) override {
    link(peer).posted[tag].push_back({static_cast<char*>(data), bytes, cookie});
    match_early(link(peer), tag, later_);
  }
  void send_control(int peer, std::string_view message) noexcept override;
  void poll(Events& events) override;
  void cancel() noexcept override;
  void shutdown(bool clean) noexcept override;
  void kill_job(int exit_code) noexcept override { ::_exit(exit_code); }

 private:
  Link& link(int peer) { return links_[static_cast<std::size_t>(peer)]; }
  void write_some(int peer, Events& events);
  void read_some(int peer, Events& events);
  void begin_message(Link& from);
  void end_message(int peer, Events& events);
  char* place_of_body(Link& from, std::size_t& room);
  static void match_early(Link& from, std::uint32_t tag, Events& events);
  void lose(int peer, Events& events);

  TcpJob job_;
  std::vector<Link> links_;
  Events later_;  // what send and receive finished at once, for the next poll
};

void TcpTransport::send_control(int peer, std::string_view message) noexcept {
  try {
    Outgoing out{{0, 1, message.size()}, nullptr, std::string(message), 0, 0};
    link(peer).out.push_back(std::move(out));
    write_some(peer, later_);
  } catch (...) {
    // Best effort.
  }
}

// Writes what the kernel takes.
void TcpTransport::write_some(int peer, Events& events) {
  Link& to = link(peer);
  while (!to.lost && !to.out.empty()) {
    Outgoing& out = to.out.front();
    const char* data = out.data ? out.data : out.owned.data();
    const std::size_t head = out.done < sizeof(Header) ? sizeof(Header) - out.done : 0;
    const std::size_t body_done = out.done - (sizeof(Header) - head);
    std::array<iovec, 2> parts{{{reinterpret_cast<char*>(&out.header) + (sizeof(Header) - head), head},
                                {const_cast<char*>(data) + body_done, out.header.bytes - body_done}}};
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    const ssize_t done = ::sendmsg(to.socket.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (done < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) lose(peer, events);
      return;
    }
    if (out.header.control == 0) events.moving.push_back(peer);
    out.done += static_cast<std::size_t>(done);
    if (out.done < sizeof(Header) + out.header.bytes) continue;
    if (out.cookie != 0) events.completions.push_back({out.cookie, out.header.bytes, false, {}});
    to.out.pop_front();
  }
}

void TcpTransport::lose(int peer, Events& events) {
  link(peer).lost = true;
  events.lost.push_back(peer);
}

// The header is complete: where does the body go?
void TcpTransport::begin_message(Link& from) {
  from.body_done = 0;
  from.direct.reset();
  if (from.header.control != 0) {
    from.control.assign(std::min<std::size_t>(from.header.bytes, kControlBytes), '\0');
    return;
  }
  auto& posted = from.posted[from.header.tag];
  auto& early = from.early[from.header.tag];
  if (!posted.empty() && early.empty()) {
    from.direct = posted.front();
    posted.pop_front();
  } else {
    early.push_back({std::string(from.header.bytes, '\0'), false});
  }
}

// Where the next bytes of the body go; nowhere (null) those past the end of what was asked for.
char* TcpTransport::place_of_body(Link& from, std::size_t& room) {
  char* data = from.direct ? from.direct->data : from.header.control ? from.control.data() : nullptr;
  std::size_t capacity = from.direct ? from.direct->bytes : from.control.size();
  if (!from.direct && from.header.control == 0) {
    std::string& kept = from.early[from.header.tag].back().data;
    data = kept.data();
    capacity = kept.size();
  }
  room = from.body_done < capacity ? capacity - from.body_done : 0;
  return room > 0 && data ? data + from.body_done : nullptr;
}

void TcpTransport::read_some(int peer, Events& events) {
  Link& from = link(peer);
  std::array<char, 4096> nowhere;
  while (!from.lost) {
    char* into = nullptr;
    std::size_t wanted = 0;
    const bool in_header = from.header_done < sizeof(Header);
    if (in_header) {
      into = reinterpret_cast<char*>(&from.header) + from.header_done;
      wanted = sizeof(Header) - from.header_done;
    } else {
      std::size_t room = 0;
      into = place_of_body(from, room);
      wanted = from.header.bytes - from.body_done;
      wanted = std::min(wanted, into ? room : nowhere.size());
      if (!into) into = nowhere.data();
    }
    const ssize_t done = ::recv(from.socket.fd(), into, wanted, MSG_DONTWAIT);
    if (done == 0 || (done < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return lose(peer, events);
    if (done < 0) return;
    if (!in_header && from.header.control == 0) events.moving.push_back(peer);
    if (in_header) {
      from.header_done += static_cast<std::size_t>(done);
      if (from.header_done == sizeof(Header)) begin_message(from);
    } else {
      from.body_done += static_cast<std::size_t>(done);
    }
    if (from.header_done == sizeof(Header) && from.body_done == from.header.bytes) end_message(peer, events);
  }
}

void TcpTransport::end_message(int peer, Events& events) {
  Link& from = link(peer);
  from.header_done = 0;
  if (from.header.control != 0) {
    events.controls.push_back({peer, from.control});
  } else if (from.direct) {
    const bool cut = from.header.bytes > from.direct->bytes;
    if (from.direct->cookie != 0) events.completions.push_back({from.direct->cookie, from.header.bytes, cut, {}});
    from.direct.reset();
  } else {
    from.early[from.header.tag].back().complete = true;
    match_early(from, from.header.tag, events);
  }
}

void TcpTransport::match_early(Link& from, std::uint32_t tag, Events& events) {
  auto& posted = from.posted[tag];
  auto& early = from.early[tag];
  while (!posted.empty() && !early.empty() && early.front().complete) {
    const Posted& to = posted.front();
    const std::string& data = early.front().data;
    if (to.data) std::memcpy(to.data, data.data(), std::min(to.bytes, data.size()));
    events.completions.push_back({to.cookie, data.size(), data.size() > to.bytes, {}});
    posted.pop_front();
    early.pop_front();
  }
}

void TcpTransport::poll(Events& events) {
  std::vector<pollfd> entries(links_.size());
  for (std::size_t r = 0; r < links_.size(); ++r) {
    const Link& at = links_[r];
    entries[r] = {at.lost ? -1 : at.socket.fd(), static_cast<short>(at.out.empty() ? POLLIN : POLLIN | POLLOUT), 0};
  }
  if (::poll(entries.data(), entries.size(), 0) > 0) {
    for (std::size_t r = 0; r < links_.size(); ++r) {
      if (entries[r].revents & POLLOUT) write_some(static_cast<int>(r), events);
      if (entries[r].revents & (POLLIN | POLLHUP | POLLERR)) read_some(static_cast<int>(r), events);
    }
  }
  const auto take = [](auto& from, auto& to) {
    to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
    from.clear();
  };
  take(later_.completions, events.completions);
  take(later_.lost, events.lost);
  take(later_.moving, events.moving);
}

// Forgets the memory of all transfers: what comes is thrown away, and only messages begun are sent to their end, from a
// copy, so that control messages can follow.
void TcpTransport::cancel() noexcept {
  try {
    for (Link& at : links_) {
      for (auto& [tag, posted] : at.posted) posted.clear();
      if (at.direct) at.direct = Posted{};
      std::erase_if(at.out, [](const Outgoing& out) { return out.data != nullptr && out.done == 0; });
      for (Outgoing& out : at.out) {
        if (out.data == nullptr) continue;
        out.owned.assign(out.data, out.header.bytes);
        out.data = nullptr;
        out.cookie = 0;
      }
    }
  } catch (...) {
    // Out of memory: the connections end with the process.
  }
}

// Says goodbye and hears the others', so that no close throws away what a peer has not read yet.
void TcpTransport::shutdown(bool clean) noexcept {
  for (Link& at : links_) {
    if (at.socket.fd() >= 0) ::shutdown(at.socket.fd(), SHUT_WR);
  }
  if (!clean) return;
  try {
    Events ignored;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    const auto open = [](const Link& at) { return at.socket.fd() >= 0 && !at.lost; };
    while (std::any_of(links_.begin(), links_.end(), open) && std::chrono::steady_clock::now() < end) {
      poll(ignored);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (...) {
    // The process is about to end anyway.
  }
}

}  // namespace

std::unique_ptr<Communicator> tcp_world(const TcpJob& job, const CommOptions& options) {
  require(job.rank >= 0 && job.rank < job.size, "rank {} of a job of {} ranks", job.rank, job.size);
  return engine_world(std::make_unique<TcpTransport>(job, std::max(60.0, options.timeout_s)), options);
}

}  // namespace dattn
