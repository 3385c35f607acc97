#include "parallel/comm/tcp_connect.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kMagic = 0xda7711c5;

// The first bytes on every connection.
struct Hello {
  std::uint32_t magic = kMagic;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::int32_t port = 0;  // where the rank listens
};

// Where a rank listens, as rank 0 sees it.
struct Place {
  std::array<char, INET6_ADDRSTRLEN> host{};
  std::int32_t port = 0;
};

std::string system_text() { return std::strerror(errno); }

class Deadline {
 public:
  explicit Deadline(double seconds)
      : end_(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))) {}
  bool over() const { return Clock::now() >= end_; }
  int milliseconds() const {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
    return static_cast<int>(std::max<std::int64_t>(0, left));
  }

 private:
  Clock::time_point end_;
};

bool ready(int fd, short what, const Deadline& deadline) {
  pollfd entry{fd, what, 0};
  return ::poll(&entry, 1, deadline.milliseconds()) > 0;
}

// All bytes, or false: the connection broke or time is up.
template <class T>
bool send_all(int fd, const T* data, std::size_t count, const Deadline& deadline) {
  const char* next = reinterpret_cast<const char*>(data);
  for (std::size_t left = count * sizeof(T); left > 0;) {
    if (!ready(fd, POLLOUT, deadline)) return false;
    const ssize_t done = ::send(fd, next, left, MSG_NOSIGNAL);
    if (done <= 0) return false;
    next += done;
    left -= static_cast<std::size_t>(done);
  }
  return true;
}

template <class T>
bool receive_all(int fd, T* data, std::size_t count, const Deadline& deadline) {
  char* next = reinterpret_cast<char*>(data);
  for (std::size_t left = count * sizeof(T); left > 0;) {
    if (!ready(fd, POLLIN, deadline)) return false;
    const ssize_t done = ::recv(fd, next, left, 0);
    if (done <= 0) return false;
    next += done;
    left -= static_cast<std::size_t>(done);
  }
  return true;
}

struct Addresses {
  Addresses(const char* host, int port, int flags) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags;
    error = getaddrinfo(host, std::to_string(port).c_str(), &hints, &list);
  }
  ~Addresses() {
    if (list) freeaddrinfo(list);
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  addrinfo* list = nullptr;
  int error = 0;
};

// Listens on this port of every interface; 0: any free port.
Socket listen_at(int port) {
  for (const int family : {AF_INET6, AF_INET}) {
    Socket socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (socket.fd() < 0) continue;
    const int on = 1, off = 0;
    setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (family == AF_INET6) setsockopt(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    sockaddr_in6 six{};
    six.sin6_family = AF_INET6;
    six.sin6_port = htons(static_cast<std::uint16_t>(port));
    sockaddr_in four{};
    four.sin_family = AF_INET;
    four.sin_port = six.sin6_port;
    const bool is_six = family == AF_INET6;
    const auto* address = is_six ? reinterpret_cast<sockaddr*>(&six) : reinterpret_cast<sockaddr*>(&four);
    if (::bind(socket.fd(), address, is_six ? sizeof six : sizeof four) == 0 && ::listen(socket.fd(), SOMAXCONN) == 0) {
      return socket;
    }
  }
  fail(ErrorCode::kSystem, "cannot listen on TCP port {}: {}; set DATTN_TCP_PORT to a free one on all ranks", port,
       system_text());
}

int port_of(const Socket& socket) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<sockaddr_in&>(address).sin_port);
}

std::string host_of_peer(const Socket& socket) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&address), &length);
  std::array<char, NI_MAXHOST> host{};
  getnameinfo(reinterpret_cast<sockaddr*>(&address), length, host.data(), host.size(), nullptr, 0, NI_NUMERICHOST);
  return host.data();
}

// Tries until somebody listens there.
Socket connect_to(const std::string& host, int port, int rank, const Deadline& deadline) {
  std::string why = "nobody listens";
  do {
    const Addresses found(host.c_str(), port, 0);
    if (found.error != 0) why = gai_strerror(found.error);
    for (const addrinfo* at = found.list; at; at = at->ai_next) {
      Socket socket(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
      if (socket.fd() >= 0 && ::connect(socket.fd(), at->ai_addr, at->ai_addrlen) == 0) return socket;
      why = system_text();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  } while (!deadline.over());
  fail(ErrorCode::kPeer, "rank {} cannot be reached at {}:{}: {}; is it running, and is the port open?", rank, host, port, why);
}

// The next rank that calls, with its hello; strangers are turned away.
std::pair<Socket, Hello> accept_rank(const Socket& listener, const TcpJob& job, std::vector<Socket>& ranks,
                                     const Deadline& deadline) {
  while (ready(listener.fd(), POLLIN, deadline)) {
    Socket socket(::accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    Hello hello;
    if (socket.fd() < 0 || !receive_all(socket.fd(), &hello, 1, Deadline(5)) || hello.magic != kMagic) continue;
    require(hello.size == job.size, "rank {} says that the job has {} ranks, but rank {} that it has {}", hello.rank,
            hello.size, job.rank, job.size);
    ensure(hello.rank > job.rank && hello.rank < job.size && ranks[static_cast<std::size_t>(hello.rank)].fd() < 0,
           "rank {} called rank {} of {} out of turn or twice", hello.rank, job.rank, job.size);
    return {std::move(socket), hello};
  }
  std::string missing;
  for (int r = job.rank + 1; r < job.size; ++r) {
    if (ranks[static_cast<std::size_t>(r)].fd() < 0) missing += fmt::format("{}{}", missing.empty() ? "" : ", ", r);
  }
  fail(ErrorCode::kPeer, "rank {} waited for ranks {} of {} to join; are they running?", job.rank, missing, job.size);
}

void make_ready(Socket& socket) {
  const int on = 1;
  setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(socket.fd(), F_SETFL, fcntl(socket.fd(), F_GETFL) | O_NONBLOCK);
}

// Rank 0: hears everybody, then sends round where they listen.
void gather_places(const TcpJob& job, std::vector<Socket>& ranks, const Deadline& deadline) {
  const Socket listener = listen_at(job.port);
  std::vector<Place> places(static_cast<std::size_t>(job.size));
  for (int known = 1; known < job.size; ++known) {
    auto [socket, hello] = accept_rank(listener, job, ranks, deadline);
    Place& place = places[static_cast<std::size_t>(hello.rank)];
    place.port = hello.port;
    host_of_peer(socket).copy(place.host.data(), place.host.size() - 1);
    ranks[static_cast<std::size_t>(hello.rank)] = std::move(socket);
  }
  for (int r = 1; r < job.size; ++r) {
    ensure(send_all(ranks[static_cast<std::size_t>(r)].fd(), places.data(), places.size(), deadline),
           "rank {} left while joining", r);
  }
}

void join_places(const TcpJob& job, std::vector<Socket>& ranks, const Deadline& deadline) {
  const Socket listener = listen_at(0);
  const Hello hello{kMagic, job.rank, job.size, port_of(listener)};
  std::vector<Place> places(static_cast<std::size_t>(job.size));
  ranks[0] = connect_to(job.host, job.port, 0, deadline);
  if (!send_all(ranks[0].fd(), &hello, 1, deadline) || !receive_all(ranks[0].fd(), places.data(), places.size(), deadline)) {
    fail(ErrorCode::kPeer, "rank 0 at {}:{} closed the connection or did not answer; see its own output", job.host, job.port);
  }
  for (int r = 1; r < job.rank; ++r) {
    Socket& socket = ranks[static_cast<std::size_t>(r)];
    const Place& place = places[static_cast<std::size_t>(r)];
    socket = connect_to(place.host.data(), place.port, r, deadline);
    ensure(send_all(socket.fd(), &hello, 1, deadline), "rank {} left while joining", r);
  }
  for (int r = job.rank + 1; r < job.size; ++r) {
    auto [socket, caller] = accept_rank(listener, job, ranks, deadline);
    ranks[static_cast<std::size_t>(caller.rank)] = std::move(socket);
  }
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

std::vector<Socket> connect_all(const TcpJob& job, double timeout_s) {
  std::vector<Socket> ranks(static_cast<std::size_t>(job.size));
  const Deadline deadline(timeout_s);
  if (job.rank == 0) {
    gather_places(job, ranks, deadline);
  } else {
    join_places(job, ranks, deadline);
  }
  for (Socket& socket : ranks) {
    if (socket.fd() >= 0) make_ready(socket);
  }
  return ranks;
}

}  // namespace dattn
