// A communicator on a slow link: every message takes latency + bytes / bandwidth, whatever the link beneath could do. For
// measuring how much of a plan's communication hides behind its computation, on one host.
//
// The link is that of simulate.h: a rank has one way out and one way in. A message begins when both sides have started the
// transfer and both ways are free (the way out at the sender's start, the way in at the receiver's), holds them for
// bytes / bandwidth and has arrived a latency later. Nothing is delayed at the start: a wait sleeps until all messages of
// its transfer have arrived and all that it sent have left. Senders tell receivers when a message begins by a stamp beside
// it, so all ranks must read one steady clock: threads or processes of one host.
#pragma once

#include <memory>

#include "parallel/comm/communicator.h"

namespace dattn {

struct SlowLink {
  double latency_s = 0;
  double bandwidth = 0;  // bytes/s of a rank and one direction, over all groups
};

// Throws Error(kBadInput) unless latency_s >= 0 and bandwidth > 0.
std::unique_ptr<Communicator> slowed(std::unique_ptr<Communicator> inner, const SlowLink& link);

}  // namespace dattn
