// verify(plan): runs a plan on all ranks symbolically, with positions and regions instead of numbers, and proves that
// every visible pair is attended exactly once, every result and gradient is complete at its owner, every send is matched
// by a receive, and no value is read before it is written or after its memory was given away. Forward or backward plan.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "parallel/plan.h"

namespace dattn {

struct Verdict {
  std::vector<std::string> problems;  // empty: proved. Each names rank, step and the smallest wrong range
  double pairs = 0;                   // visible pairs of one head, over all batch rows
  bool ok() const { return problems.empty(); }
};

Verdict verify(const Plan& plan);

// The same for callers that go on with right plans only: throws Error(kInternal) with all problems. name: "forward",
// "backward".
Verdict require_proved(const Plan& plan, std::string_view name);

}  // namespace dattn
