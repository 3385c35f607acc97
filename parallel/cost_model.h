// What an attention costs on a mesh, in closed form: the transfers that a strategy makes, from which follow bytes and an
// estimate of the time. For planning, where thousands of candidates are compared; rank_plan.h has the exact costs and
// simulate.h the careful times. Exact means over ranks where lengths divide.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "parallel/layout_cost.h"
#include "parallel/machine.h"
#include "parallel/strategy.h"

namespace dattn {

// Messages of one kind over one axis, of a mean rank.
struct Transfer {
  Axis axis = Axis::kRing;
  double messages = 0;  // one after the other
  double bytes = 0;     // payload of all of them together
  bool hops = false;    // each to the next rank of the axis, behind a computation; else to all ranks, and waited for
};

struct TransferLists {
  std::vector<Transfer> forward;
  std::vector<Transfer> backward;
};
// In closed form; nothing where there is none. `seen` is for fetch and halo.
std::optional<TransferLists> transfers_of(std::string_view strategy, const AttentionShape& shape, const MeshShape& mesh,
                                          const SeenRows& seen = {});
// The same counted on some ranks of the strategy's plans.
TransferLists counted_transfers(const Strategy& strategy, const Problem& problem);
double bytes_of(const std::vector<Transfer>& transfers);

// Query heads of a mean rank over those of the rank with most.
double head_balance(const AttentionShape& shape, const MeshShape& mesh);
double visible_pairs(const CompiledMask& mask);  // of one head, over all batch rows

struct Work {
  double pairs = 0;                  // visible pairs of one head, over all batch rows and ranks
  double forward = 1, backward = 1;  // time of the slowest rank over that of a mean rank that works on visible pairs alone
};
// Seconds of forward and backward on the machine: the slowest rank computes, hops hide behind its pieces.
double estimated_time(const TransferLists& transfers, const AttentionShape& shape, const MeshShape& mesh, const Work& work,
                      const Machine& machine);

// Evenly spaced numbers below `count`, all where there are few; first and last among them.
std::vector<int> sample(int count, int most);

}  // namespace dattn
