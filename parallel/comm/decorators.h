// Decorators: a communicator around a communicator; split() decorates the parts with the same sink. Nothing escapes:
// collectives are made of the decorated exchanges, but where the back end has its own and the decorators around it only look on
// (counted, traced). Outermost first: counted(traced(faulty(world))), with a slowed link (slowed.h) inside traced.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "parallel/comm/trace.h"

namespace dattn {

// Payload bytes that this rank received and sent, by verb. Parts sent to oneself do not count.
struct ByteCounts {
  std::int64_t received = 0;
  std::int64_t sent = 0;
  std::int64_t operations = 0;
};

class ByteCounter {
 public:
  void count(std::string_view verb, std::int64_t received, std::int64_t sent);
  std::map<std::string, ByteCounts> by_verb() const;
  ByteCounts total() const;
  void reset();

 private:
  mutable std::mutex mutex_;
  std::map<std::string, ByteCounts, std::less<>> counts_;
};

std::unique_ptr<Communicator> counted(std::unique_ptr<Communicator> inner, std::shared_ptr<ByteCounter> counter);

// Tracks `comm GROUP`, a transfer from its start to the end of the wait for it, and `exposed communication`, the wait alone.
std::unique_ptr<Communicator> traced(std::unique_ptr<Communicator> inner, std::shared_ptr<Trace> trace);

// Faults for tests: on the n-th start() of this rank (counted over all groups, from 0) something goes wrong.
struct Fault {
  enum class Kind { kDelay, kDrop, kKill };
  Kind kind = Kind::kDelay;
  std::int64_t at = 0;
  double delay_s = 0;  // kDelay: sleeps before starting; kDrop: the sends are never made; kKill: throws as if the rank died
};

std::unique_ptr<Communicator> faulty(std::unique_ptr<Communicator> inner, const Fault& fault);

}  // namespace dattn
