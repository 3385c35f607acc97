// Parts that strategies share.
#pragma once

#include "parallel/strategy.h"

namespace dattn {

// Attends to the kv of every rank of the axis in turn, passing kv around.
inline ValueId attend_around(PlanBuilder& plan, ValueId q, ValueId kv, Axis axis) {
  ValueId state = plan.attend(q, kv);
  for (int hop = 1; hop < plan.size(axis); ++hop) {
    kv = plan.rotate(kv, axis);
    state = plan.attend(q, kv, state);
  }
  return state;
}

// Runs inner(q, kv) -> state with whole stretches of the sequence and a share of the heads instead of the reverse.
template <class Inner>
ValueId inside_ulysses(PlanBuilder& plan, const Inner& inner) {
  const ValueId q = plan.seq_to_head(plan.q(), Axis::kUlysses);
  const ValueId kv = plan.seq_to_head(plan.kv(), Axis::kUlysses);
  return plan.head_to_seq(plan.finish(inner(q, kv)), Axis::kUlysses, plan.q());
}

}  // namespace dattn
