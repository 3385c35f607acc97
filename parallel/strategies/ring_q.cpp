// Pass-Q ring: every rank keeps its keys and values; queries go round and their states follow one hop behind, collecting a
// piece on every rank. A rank's own queries are attended last, while its state comes home.
//
//   hop 1: q r-1 visits rank r      hop 2: q r-2, and the state of hop 1 arrives      ..      home: the state of q r
//
// Source: Yang et al., "Context Parallelism for Scalable Million-Token Inference", 2024, section 3.5 (ring pass-Q).
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy ring_q_strategy() {
  return {"ring_q", "passes q and its partial results around the ring axis",
          [](const Problem& problem) { return uses(problem, "ring_q", {Axis::kRing}); },
          [](PlanBuilder& plan) {
            ValueId q = plan.q(), state = kNoValue;
            for (int hop = 1; hop < plan.size(Axis::kRing); ++hop) {
              q = plan.rotate(q, Axis::kRing);
              const ValueId piece = plan.attend(q, plan.kv());
              state = state == kNoValue ? piece : plan.add(piece, plan.rotate(state, Axis::kRing));
            }
            const ValueId own = plan.attend(plan.q(), plan.kv());
            return plan.finish(state == kNoValue ? own : plan.add(own, plan.rotate(state, Axis::kRing)));
          }};
}

}  // namespace dattn
