// Hybrid: ulysses around ring (or a ring of rings), heads over one axis and the sequence over the other.
//
//   ring ->      r0u0 r0u1 | r1u0 r1u1      all-to-all inside each pair, then kv of a head share goes round r0 -> r1
//
// Source: Fang and Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", 2024.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy hybrid_strategy() {
  return {"hybrid", "ulysses around ring",
          [](const Problem& problem) {
            return uses(problem, "hybrid", {Axis::kRingOuter, Axis::kRing, Axis::kUlysses});
          },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) { return attend_around_both(plan, q, kv); });
          }};
}

}  // namespace dattn
