// The part of `dattn plan` that walks the plans on a machine in place of running them.
#pragma once

#include <string>

#include "launch/commands/commands.h"

namespace dattn {

struct SimulateOptions {
  std::string machine;   // a YAML file; empty: no simulation
  std::string timeline;  // writes this .json and .html; empty: no timeline
  int timeline_ranks = 64;

  void declare(CLI::App& command);
  bool wanted() const { return !machine.empty(); }
};

// Simulates both plans, writes the timelines asked for, and returns what --json reports.
Json simulate_plans(const SimulateOptions& options, const Plan& forward, const Plan& gradient);
void print_simulation(const Json& simulated, const Plan& forward);  // as a table

}  // namespace dattn
