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
  std::string_view summary;                             // one line for help texts
  Support (*accepts)(const MeshShape& mesh) = nullptr;  // why not: names the nearest supported choice
  ValueId (*write)(PlanBuilder& plan) = nullptr;        // returns the result value
};

const std::vector<Strategy>& strategies();           // made by the build from the files of parallel/strategies
std::string choose_strategy(const MeshShape& mesh);  // what "auto" stands for

// Checks the shape, compiles the mask and lets the named strategy (or auto) write its plan. Throws Error(kBadInput).
Plan make_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options);

}  // namespace dattn
