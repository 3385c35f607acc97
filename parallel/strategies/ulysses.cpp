// Ulysses: an all-to-all turns sequence shards into head shards, attention is local, another one turns the result back.
// Head counts need not divide: query heads are split ceil/floor, each rank with the KV heads they need.
//
// Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
// Transformer Models", 2023.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy ulysses_strategy() {
  return {"ulysses", "turns sequence shards into head shards and back",
          [](const Problem& problem) { return uses(problem, "ulysses", {Axis::kUlysses}); },
          [](PlanBuilder& plan) { return inside_ulysses(plan, [&](ValueId q, ValueId kv) { return plan.attend(q, kv); }); }};
}

}  // namespace dattn
