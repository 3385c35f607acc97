// How the ranks of a TCP job find each other. Rank 0 listens at an address known to all; everybody else connects to it and
// tells where it listens itself; rank 0 sends round the list; then each rank connects to the lower ones and accepts the
// higher ones.
#pragma once

#include <vector>

#include "parallel/comm/tcp.h"

namespace dattn {

// A file descriptor that closes itself.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(other.release()) {}
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();
  int fd() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_ = -1;
};

// One connected, non-blocking socket for each rank; this rank's own is empty.
std::vector<Socket> connect_all(const TcpJob& job, double timeout_s);

}  // namespace dattn
