// The planner: which mesh, strategy and layout an attention should run with, and why. It costs every way to shape n ranks
// as ulysses x rows x ring, with every strategy that takes the mesh, in every layout: bytes in closed form (cost_model.h), work
// as the layout shares it out (layout_cost.h), from which follows a time on a machine. Then it looks closer at the best: what
// memory they need and, where that is quick, what time they take when simulated.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "parallel/machine.h"
#include "parallel/strategy.h"

namespace dattn {

enum class Objective { kBytes, kTime };

struct PlanRequest {
  AttentionShape shape;      // batch: of one data coordinate
  AttentionOptions options;  // strategy: auto, or the only one to consider; layout: taken where `fixed_layout`
  MeshShape mesh;            // as it is where `ranks` is absent; else its data and tensor axes
  std::optional<int> ranks;  // of the whole job: the planner shapes the sequence axes
  bool fixed_layout = false;
  Objective objective = Objective::kBytes;
  const Machine* machine = nullptr;  // kTime needs one
  std::int64_t memory_bytes = 0;     // of a rank; 0 = any
};

struct Candidate {
  std::string strategy;
  MeshShape mesh;
  Layout layout = Layout::kZigzag;
  double forward_bytes = 0;  // received by a mean rank, without statistics
  double backward_bytes = 0;
  double balance = 1;            // mean over most work of a rank
  double in_step = 1;            // forward: most work of a rank over that and the waits of a ring for its slowest ranks
  double worked = 1;             // forward: pairs of the machine's tiles over visible pairs
  double time_s = 0;             // forward and backward, where there is a machine
  bool simulated = false;        // time_s is of simulate.h, not of a closed form
  std::int64_t peak_memory = 0;  // of the rank that holds most, of large meshes in a sample: inputs and the plan's values

  std::string text() const;  // "hybrid on ring 8 x ulysses 8, layout zigzag"
};

struct Rejected {
  std::string what;
  std::string why;
};

struct Choice {
  Objective objective = Objective::kBytes;
  Candidate chosen;
  std::optional<Candidate> runner_up;
  std::vector<Candidate> layouts;  // the choice in every layout that was tried, memory left out
  std::string layout_reason;       // why the chosen one
  std::vector<Rejected> rejected;
  double lower_bound_bytes = 0;  // forward
  double ratio = 1;              // chosen.forward_bytes over it
};

// Deterministic. Throws Error(kBadInput) where nothing is left, with what was refused.
Choice plan_attention(const PlanRequest& request);

// What strategy auto runs on a given mesh and layout: the plan of the strategy that plan_attention chooses there by bytes,
// whatever its memory.
Plan make_auto_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options);

// The costs of one mesh and strategy, in the request's layout; memory left out.
Candidate assess(const PlanRequest& request, const MeshShape& mesh, const std::string& strategy);

double ratio_over(double bytes, double lower_bound);  // 1 where both are 0

}  // namespace dattn
