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
          [](const Problem& problem) -> Support {
            const AttentionShape& shape = problem.shape;
            const std::int64_t group = shape.heads / shape.kv_heads;
            const int parts = problem.mesh.size(Axis::kTensor);
            for (int part = 0; part < parts; ++part) {
              const Interval heads = heads_of(shape.heads, shape.kv_heads, parts, part).q;
              if (heads.count() == 0 || (heads.begin % group == 0 && heads.end % group == 0)) continue;
              return {false, fmt::format("determinism invariant: mesh.tensor {} cuts through a group of {} query heads, whose "
                                         "gradients would be added in another order; use at most {} tensor ranks",
                                         parts, group, shape.kv_heads)};
            }
            return {};
          },
          [](PlanBuilder& plan) { return plan.finish(plan.attend(plan.q(), plan.gather_sequence(plan.kv()))); }, false};
}

}  // namespace dattn
