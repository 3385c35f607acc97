// Transport: what an engine (engine.h) needs of MPI or TCP: to move pieces of memory between processes without blocking,
// and small control messages beside them. The engine calls it from one thread at a time, under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace dattn {

class Transport {
 public:
  virtual ~Transport() = default;  // after shutdown(); never throws, never hangs

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::uint32_t tags() const = 0;     // tags are 0 .. tags() - 1
  virtual std::size_t max_piece() const = 0;  // bytes; longer messages are cut by the engine

  // Pieces of one (source, destination, tag) are matched in order. `cookie` comes back when the memory is free again.
  virtual void send(int peer, std::uint32_t tag, const void* data, std::size_t bytes, std::uint64_t cookie) = 0;
  virtual void receive(int peer, std::uint32_t tag, void* data, std::size_t bytes, std::uint64_t cookie) = 0;

  static constexpr std::size_t kControlBytes = 2048;
  virtual void send_control(int peer, std::string_view message) noexcept = 0;  // best effort

  struct Completion {
    std::uint64_t cookie = 0;
    std::size_t bytes = 0;  // that arrived; not those of a piece cut off
    bool cut = false;       // the sender sent more than was asked for
    std::string error;      // why the transfer failed; empty: it did not
  };
  struct Control {
    int peer = 0;
    std::string message;
  };
  struct Events {
    std::vector<Completion> completions;
    std::vector<Control> controls;
    std::vector<int> lost;    // peers whose connection broke
    std::vector<int> moving;  // peers to or from whom transfers flow (not control messages), where it can tell
  };
  virtual void poll(Events& events) = 0;

  // After a failure: the memory of transfers under way may go away; nothing more is written into it if that can be helped.
  virtual void cancel() noexcept = 0;
  // The last call but kill_job. clean: all ranks come here having nothing under way.
  virtual void shutdown(bool clean) noexcept = 0;
  // Ends the processes of the job, as far as the transport can, and this one.
  virtual void kill_job(int exit_code) noexcept = 0;
};

}  // namespace dattn
