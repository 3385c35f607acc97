// Halo: for windows that reach no further than the neighbouring ranks. Every rank attends its own keys, then the edges that
// it fetches from the rank before it and the rank after it (inside ulysses, if there is one).
//
//   rank r-1 |......##|    rank r |########|    rank r+1 |#.......|      # keys that the queries of rank r see
//
// Source: halo exchange of stencil codes; for attention: Beltagy et al., "Longformer", 2020, whose windows it serves.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy halo_strategy() {
  return {"halo", "fetches the edges of the neighbouring ranks' keys, for windows",
          [](const Problem& problem) -> Support {
            const Support axes = uses(problem, "halo", {Axis::kRing, Axis::kUlysses});
            return axes.ok ? sees_neighbours_only(problem, "halo") : axes;
          },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              const ValueId own = plan.attend(q, kv);
              return attend_each(plan, q, fetch_from_neighbours(plan, kv, q, Axis::kRing), own);
            });
          }};
}

}  // namespace dattn
