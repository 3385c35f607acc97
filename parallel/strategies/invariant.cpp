// Invariant: the plan of `determinism: invariant`. Every rank gets all keys in global order and attends them in fixed blocks;
// in backward, keys get all queries in the same way. So no sum depends on where the mesh, the layout or the threads cut the
// sequence, and the bits are the same on all of them.
//
//   forward    out, lse of a row: at its owner, over key blocks 0, 1, 2, ..
//   backward   dq of a row: at its owner, over key blocks 0, 1, ..      dk, dv of a key: at its owner, over query blocks 0, 1,
//   ..
//
// Source: batch-invariant kernels (He and Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025), here over
// meshes.
#include "parallel/strategies/compose.h"

namespace dattn {

Strategy invariant_strategy() {
  return {"invariant", "gathers kv (backward: q) in global order, for the same bits on every mesh",
          [](const Problem& problem) { return keeps_head_groups(problem, "determinism invariant"); },
          [](PlanBuilder& plan) { return plan.finish(plan.attend(plan.q(), plan.gather_sequence(plan.kv()))); }, false};
}

}  // namespace dattn
