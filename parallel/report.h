// What is reported of plans and of the planner's choice, by the command and by the C interface.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "parallel/plan.h"
#include "parallel/planner.h"

namespace dattn {

using Json = nlohmann::ordered_json;

// Costs of a plan over all ranks, or on large meshes over a sample of them (then `sampled_ranks` says of how many).
Json plan_costs(const Plan& forward, const Plan& gradient);

Json to_json(const MeshShape& mesh);  // the size of every axis by name

// What the planner says, as text and as JSON.
std::string explain(const Choice& choice);
Json to_json(const Choice& choice);

}  // namespace dattn
