// Double ring: a ring of rings. kv goes round the inner ring (inside a node) once for every hop of the outer one (between
// nodes), and a hop of the outer ring has a whole inner round to hide behind.
//
//   outer hop 0: rank (o, i) attends kv (o, i), (o, i-1), ..      outer hop 1: kv (o-1, i), (o-1, i-1), ..
//
// Source: Gu et al., "LoongTrain: Efficient Training of Long-Sequence LLMs with Head-Context Parallelism", 2024, section 4.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy double_ring_strategy() {
  return {"double_ring", "passes kv around an inner ring once for every hop of an outer ring",
          [](const Problem& problem) {
            return uses(problem, "double_ring", {Axis::kRingOuter, Axis::kRing});
          },
          [](PlanBuilder& plan) { return plan.finish(attend_around_both(plan, plan.q(), plan.kv())); }};
}

}  // namespace dattn
