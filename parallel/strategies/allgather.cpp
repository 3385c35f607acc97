// All-gather: every rank gets all keys and values of the ring and rows axes and attends once (inside ulysses, if there is
// one). Fewer, larger messages than a ring and one large tile, for the price of holding the whole kv.
//
// Source: Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.2 (all-gather context parallelism).
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy allgather_strategy() {
  return {"allgather", "gathers kv over the ring and rows axes", [](const Problem&) { return Support{}; },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              return plan.attend(q, gather_over(plan, kv, {Axis::kRows, Axis::kRing, Axis::kRingOuter}));
            });
          }};
}

}  // namespace dattn
