// What strategies need of a problem: which axes have ranks, how far a mask reaches, where heads are cut. Each says why not,
// with the nearest supported choice.
#pragma once

#include <initializer_list>
#include <string_view>

#include "parallel/plan.h"

namespace dattn {

// Refuses a mesh with ranks on a sequence axis that the strategy has no use for.
Support uses(const Problem& problem, std::string_view strategy, std::initializer_list<Axis> axes);

// Of the keys that the queries of a ring place see, those that neither its own ranks nor the places before and after it hold.
// Ranks that differ in other axes than the ring hold the same rows after ulysses.
std::int64_t keys_beyond_neighbours(const Problem& problem, int place);
// Refuses problems where a place sees such keys.
Support sees_neighbours_only(const Problem& problem, std::string_view strategy);

// Refuses a tensor axis that cuts through a group of query heads, whose gradients are then sums over ranks.
Support keeps_head_groups(const Problem& problem, std::string_view what);

}  // namespace dattn
