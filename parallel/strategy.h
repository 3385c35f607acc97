// A strategy says how kv or q travel: a pure function that writes a plan. One file of parallel/strategies each, found
// by the build; the conformance suite sweeps all of them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/plan.h"

namespace dattn {

struct Strategy {
  std::string_view name;
  std::string_view summary;                              // one line for help texts
  Support (*accepts)(const Problem& problem) = nullptr;  // why not: names the nearest supported choice
  ValueId (*write)(PlanBuilder& plan) = nullptr;         // returns the result value
  bool automatic = true;                                 // whether the planner may choose it
};

const std::vector<Strategy>& strategies();  // made by the build from the files of parallel/strategies
// The plainest strategy that has a use for all axes of the mesh; the planner's where costs are equal.
std::string plainest_strategy(const MeshShape& mesh);

// Checks the shape, compiles the mask and lets the named strategy (or auto) write its plan. Throws Error(kBadInput).
Plan make_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options);
// Tells the log, once, where the plan has another strategy than the options name.
void tell_replaced_strategy(const AttentionOptions& options, const Plan& plan);

// The pieces of that: what is computed, whether the strategy takes it, and its plan.
std::shared_ptr<const Problem> make_problem(const MeshShape& mesh, const AttentionShape& shape,
                                            const AttentionOptions& options);
const Strategy& find_strategy(std::string_view name);  // throws Error(kBadInput) naming the known ones
Plan write_plan(const Strategy& strategy, std::shared_ptr<const Problem> problem);

}  // namespace dattn
