// Grid: ulysses x rows x ring. Inside ulysses the ranks form a grid: queries are gathered along its rows axis, keys and
// values go round its ring axis, and the partial results are combined along the rows axis, each rank keeping its own
// rows. A rank so sees rows x ring blocks for rows + ring blocks received: 2-D matrix-product communication.
//
//            ring ->                        rank (i, j) attends q (*, j) with kv (i, *)
//   rows |   q00 kv00   q01 kv01            and then merges its q's states over the column (*, j)
//        v   q10 kv10   q11 kv11
//
// Source: the communication-avoiding 2-D distributions of dense linear algebra (van de Geijn and Watts, "SUMMA", 1997), with
// the states of Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, in place of sums.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy grid_strategy() {
  return {"grid", "gathers q over rows, passes kv around the ring, combines over rows",
          [](const Problem&) { return Support{}; },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              return with_gathered_q(plan, q, Axis::kRows, [&](ValueId all) { return attend_around_both(plan, all, kv); });
            });
          }};
}

}  // namespace dattn
