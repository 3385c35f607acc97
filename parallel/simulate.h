// simulate(plan, machine): the time a plan would take on a machine, by walking it on all ranks with the costs of the
// machine in place of numbers and messages. Deterministic, for any number of ranks.
//
// Each rank works through the actions of overlap.h one after the other. A computation takes its FLOPs at the kernel's
// rate, or its bytes at the memory's bandwidth where that is longer. Starting a move copies what is sent into messages,
// waiting for it copies what came out of them; a rotation of a value in one block of memory copies nothing, as in run.h.
//
// Links: a rank has, inside its node and between nodes, one way out and one way in, first come first served. A message
// begins when both sides have started the move and both ways are free; it holds them for bytes / bandwidth and has
// arrived a latency later. Messages of one move go out in rounds, to the peer 1 further along the axis, then 2, .., so
// that in every round each rank sends to one and receives from one. The ranks of a node share node_bandwidth: a message
// that leaves or enters the node ends no earlier than all bytes begun before it can have passed. A move has ended at a
// rank when all its messages have arrived and all it sends have left.
#pragma once

#include <array>
#include <vector>

#include "parallel/machine.h"
#include "parallel/plan.h"

namespace dattn {

// What a rank does over a stretch of time, for timelines.
struct Span {
  enum class Kind { kCompute, kCopy, kInside, kBetween };  // the last two: a message that this rank receives
  Kind kind = Kind::kCompute;
  int rank = 0;
  std::size_t step = 0;
  double begin_s = 0;
  double seconds = 0;
  std::int64_t bytes = 0;  // messages and copies
  int peer = -1;           // messages: the rank it comes from
};

// What a rank receives over one axis of the mesh.
struct AxisTimes {
  std::int64_t bytes = 0;  // statistics included
  double busy_s = 0;       // for which these messages held the rank's way in
};

struct RankTimes {
  double end_s = 0;
  double compute_s = 0;  // computing and copying
  double exposed_s = 0;  // waiting for moves, peers that are late included; end_s = compute_s + exposed_s
  double flops = 0;
  std::int64_t bytes_inside = 0;  // received, statistics included
  std::int64_t bytes_between = 0;
  std::int64_t peak_memory = 0;  // inputs and the plan's own values
  std::array<AxisTimes, kAxes.size()> axes{};

  AxisTimes& over(Axis axis) { return axes[static_cast<std::size_t>(axis)]; }
  const AxisTimes& over(Axis axis) const { return axes[static_cast<std::size_t>(axis)]; }
};

// The links of one axis, over all ranks.
struct AxisUse {
  Axis axis = Axis::kRing;
  double bytes = 0;                // received by a mean rank
  double busiest_s = 0;            // for which the busiest rank's way in was held
  std::int64_t busiest_bytes = 0;  // that this rank received
};

struct Simulation {
  double time_s = 0;  // until the last rank has ended
  std::vector<RankTimes> ranks;
  std::vector<Span> spans;  // of the ranks that were asked for

  double mean(double RankTimes::*member) const;
  double most(double RankTimes::*member) const;
  std::int64_t most(std::int64_t RankTimes::*member) const;
  std::int64_t sum(std::int64_t RankTimes::*member) const;
  std::vector<AxisUse> axes() const;  // over which anything travelled, slowest first
};

// Spans are kept of ranks below `timeline_ranks`. Throws Error(kBadInput) where the mesh needs more nodes than the machine
// has, or the machine has no rate for the storage type.
Simulation simulate(const Plan& plan, const Machine& machine, int timeline_ranks = 0);
double simulated_time(const Plan& forward, const Plan& gradient, const Machine& machine);  // seconds of both
// Whether simulating a plan takes seconds at most: its work grows with ranks x rows (a million on 256 ranks are about the
// most).
bool quick_to_simulate(const AttentionShape& shape, int ranks);

}  // namespace dattn
