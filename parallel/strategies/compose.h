// Parts that strategies share.
#pragma once

#include <initializer_list>
#include <vector>

#include "parallel/requirements.h"
#include "parallel/strategy.h"

namespace dattn {

// Attends to the kv of every rank of the axis in turn, passing kv around.
inline ValueId attend_around(PlanBuilder& plan, ValueId q, ValueId kv, Axis axis, ValueId state = kNoValue) {
  state = plan.attend(q, kv, state);
  for (int hop = 1; hop < plan.size(axis); ++hop) {
    kv = plan.rotate(kv, axis);
    state = plan.attend(q, kv, state);
  }
  return state;
}

// A ring of rings: kv goes round the inner ring while the block it started with is on its way to the next outer rank.
inline ValueId attend_around_both(PlanBuilder& plan, ValueId q, ValueId kv) {
  ValueId state = attend_around(plan, q, kv, Axis::kRing);
  for (int hop = 1; hop < plan.size(Axis::kRingOuter); ++hop) {
    kv = plan.rotate(kv, Axis::kRingOuter);
    state = attend_around(plan, q, kv, Axis::kRing, state);
  }
  return state;
}

// The value with the rows of all ranks of the axes, one axis after the other.
inline ValueId gather_over(PlanBuilder& plan, ValueId value, std::initializer_list<Axis> axes) {
  for (const Axis axis : axes) value = plan.gather(value, axis);
  return value;
}

// The keys that q sees on the rank before and on the rank after this one, where there are such.
inline std::vector<ValueId> fetch_from_neighbours(PlanBuilder& plan, ValueId kv, ValueId q, Axis axis) {
  std::vector<ValueId> edges;
  if (plan.size(axis) > 1) edges.push_back(plan.fetch(kv, q, axis, 1));
  if (plan.size(axis) > 2) edges.push_back(plan.fetch(kv, q, axis, -1));
  return edges;
}

// Attends to one after the other.
inline ValueId attend_each(PlanBuilder& plan, ValueId q, const std::vector<ValueId>& keys, ValueId state) {
  for (const ValueId kv : keys) state = plan.attend(q, kv, state);
  return state;
}

// Runs inner(q, kv) -> state with whole stretches of the sequence and a share of the heads instead of the reverse.
template <class Inner>
ValueId inside_ulysses(PlanBuilder& plan, const Inner& inner) {
  const ValueId q = plan.seq_to_head(plan.q(), Axis::kUlysses);
  const ValueId kv = plan.seq_to_head(plan.kv(), Axis::kUlysses);
  return plan.head_to_seq(plan.finish(inner(q, kv)), Axis::kUlysses, plan.q());
}

// Runs inner(q) -> state with the queries of all ranks of the axis, then gives each rank its own rows of the merged states.
template <class Inner>
ValueId with_gathered_q(PlanBuilder& plan, ValueId q, Axis axis, const Inner& inner) {
  return plan.combine(inner(plan.gather(q, axis)), axis, q);
}

}  // namespace dattn
