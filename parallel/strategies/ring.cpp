// Ring: every rank keeps its queries; keys and values go round.
//
//   hop 0: rank r attends kv r      hop 1: kv r-1      ..      hop P-1: kv r+1
//
// Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy ring_strategy() {
  return {"ring", "passes kv around the ring axis", [](const Problem& problem) { return uses(problem, "ring", {Axis::kRing}); },
          [](PlanBuilder& plan) { return plan.finish(attend_around(plan, plan.q(), plan.kv(), Axis::kRing)); }};
}

}  // namespace dattn
