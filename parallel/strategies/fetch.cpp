// Fetch: every rank attends its own keys while the key ranges that its queries see elsewhere, and no others, come straight
// from the ranks that hold them (inside ulysses, if there is one). The bytes fall with the visible area of the mask.
//
// Source: Zilong Wang et al., "MagiAttention: A Distributed Attention Towards Linear Scalability for Ultra-Long Context,
// Heterogeneous Mask Training", 2025 (group-cast of the keys that a rank needs).
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy fetch_strategy() {
  return {"fetch", "fetches the key ranges that a rank's queries see, and no others",
          [](const Problem& problem) {
            return uses(problem, "fetch", {Axis::kRing, Axis::kUlysses});
          },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              const ValueId own = plan.attend(q, kv);
              return plan.size(Axis::kRing) == 1 ? own : plan.attend(q, plan.fetch(kv, q, Axis::kRing), own);
            });
          }};
}

}  // namespace dattn
