// Grid with gathered keys: as strategy grid, with the kv of the ring axes gathered in place of passed around. One large tile
// and as few messages as there are axes, for the price of holding the kv of a whole row.
//
//            ring ->                        rank (i, j) attends q (*, j) with kv (i, *) at once
//   rows |   q00 kv00   q01 kv01            and then merges its q's states over the column (*, j)
//        v   q10 kv10   q11 kv11
//
// Source: van de Geijn and Watts, "SUMMA", 1997, with panels as wide as the grid.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy grid_gather_strategy() {
  return {"grid_gather", "gathers q over rows and kv over the ring, combines over rows",
          [](const Problem&) { return Support{}; },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              const ValueId row = gather_over(plan, kv, {Axis::kRing, Axis::kRingOuter});
              return with_gathered_q(plan, q, Axis::kRows, [&](ValueId all) { return plan.attend(all, row); });
            });
          }};
}

}  // namespace dattn
