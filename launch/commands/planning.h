// From a config to what the planner is asked, and back: meshes given as `mesh: {ranks: n}` become axes here.
#pragma once

#include <optional>

#include "launch/commands/commands.h"
#include "parallel/planner.h"
#include "plugins/train/memory.h"
#include "plugins/train/train_job.h"

namespace dattn {

// Sizes of the call on the first data coordinate: its share of the config's `shape`, or of the model that it trains.
AttentionShape planned_shape(const RunConfig& config);

std::optional<Machine> machine_of(const RunConfig& config);

// Whether the planner chooses: where the ranks alone are given, an objective is, or strategy auto (which determinism: invariant
// replaces).
bool is_planned(const RunConfig& config);

// The config with the chosen axes, strategy and layout in place of what asked for them. The same on every rank.
RunConfig with_choice(RunConfig config, const Candidate& chosen);

// The config as it runs: planned where is_planned, else with the default layout.
RunConfig resolve_mesh(const RunConfig& config, const AttentionShape& shape);
RunConfig resolve_mesh(const RunConfig& config);  // for planned_shape

// What the config says of training, its mesh resolved.
TrainJob train_job(const RunConfig& config);

// What training holds on the rank that holds most, of large meshes among a sample of their ranks.
TrainingMemory predicted_memory(const RunConfig& config, const Plan& forward, const Plan& gradient);
// The same for a config whose mesh has been resolved.
TrainingMemory predicted_memory(const RunConfig& config);

}  // namespace dattn
