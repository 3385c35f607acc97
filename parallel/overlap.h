// The order in which a runner (run.h) works through a plan: when it starts each move, when it waits for it, when it
// computes. The order follows from the list of steps alone, so it holds for every rank.
//
// The rule: before a computation the runner waits for the moves that make its inputs; then it starts, in list order, each
// later move whose input is at hand (a plan input, something computed, or a move that was waited for); then it waits for
// the moves that still send from memory the computation writes into; then it computes. A move that the list reaches
// before it was started is started there. So a move starts at a rank when its input became available or when the
// computation before it in this order ended, whichever is later.
#pragma once

#include <vector>

#include "parallel/plan.h"

namespace dattn {

struct Action {
  enum class Kind { kStart, kWait, kCompute };
  Kind kind = Kind::kCompute;
  std::size_t step = 0;
  std::size_t at = 0;  // how far the list is worked off then: its step that is about to start or be computed

  bool operator==(const Action&) const = default;
};

// Every move is started once and waited for once; every computation is computed once.
std::vector<Action> actions_of(const Plan& plan);

}  // namespace dattn
