// Timelines of simulated plans: as a trace for Perfetto (ui.perfetto.dev, chrome://tracing) and as one page of HTML that
// needs nothing else. Phases (forward, backward) follow one another.
#pragma once

#include <string>
#include <vector>

#include "parallel/simulate.h"

namespace dattn {

struct Phase {
  std::string name;
  const Plan* plan = nullptr;
  const Simulation* simulation = nullptr;
};

// Chrome trace events: a process for every rank; threads `work`, `from this node`, `from other nodes`. Times in us.
std::string timeline_json(const std::vector<Phase>& phases);

// A lane for every rank with its work above and the messages it receives below; zoom, drag and hover.
std::string timeline_html(const std::string& title, const std::vector<Phase>& phases);

}  // namespace dattn
