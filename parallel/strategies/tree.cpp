// Tree: queries are gathered over every axis but ulysses, each rank attends them with the keys it holds, and the states are
// combined, each rank keeping its own rows. Keys and values never move: for decoding and short queries on a long cache.
//
// Source: Shyam et al., "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters", 2024.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy tree_strategy() {
  return {"tree", "gathers q, keeps kv where it is and combines the results", [](const Problem&) { return Support{}; },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              return with_gathered_q(plan, q, Axis::kRows, [&](ValueId rows) {
                return with_gathered_q(plan, rows, Axis::kRing, [&](ValueId ring) {
                  return with_gathered_q(plan, ring, Axis::kRingOuter, [&](ValueId all) { return plan.attend(all, kv); });
                });
              });
            });
          }};
}

}  // namespace dattn
