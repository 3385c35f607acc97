// Kinds of broken plan, for tests of verify(): each makes, of a right plan, every plan that is broken in its way.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "parallel/plan.h"

namespace dattn {

struct FaultKind {
  std::string name;
  std::string says;  // a regular expression that one of the problems must match
  std::function<std::vector<Plan>(const Plan&)> variants;
  bool formal = false;  // wrong whatever the positions are: no range to name
};

// Every variant of every kind computes something else, or nothing at all, provided that each pair of shards has visible
// pairs and every rank has rows and heads.
const std::vector<FaultKind>& fault_kinds();

}  // namespace dattn
