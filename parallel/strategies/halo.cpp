// Halo: for windows that reach no further than the neighbouring ranks. Every rank attends its own keys, then the edges that
// it fetches from the rank before it and the rank after it (inside ulysses, if there is one).
//
//   rank r-1 |......##|    rank r |########|    rank r+1 |#.......|      # keys that the queries of rank r see
//
// Source: halo exchange of stencil codes; for attention: Beltagy et al., "Longformer", 2020, whose windows it serves.
#include "parallel/strategies/compose.h"

namespace dattn {
namespace {

std::vector<ValueId> fetch_edges(PlanBuilder& plan, ValueId q, ValueId kv) {
  std::vector<ValueId> edges;
  if (plan.size(Axis::kRing) > 1) edges.push_back(plan.fetch(kv, q, Axis::kRing, 1));
  if (plan.size(Axis::kRing) > 2) edges.push_back(plan.fetch(kv, q, Axis::kRing, -1));
  return edges;
}

// Whether the two neighbours hold all that a rank's queries see. Ranks that differ in other axes than the ring hold the
// same rows after ulysses.
Support reaches_neighbours_only(const Problem& problem) {
  PlanBuilder plan("halo", std::shared_ptr<const Problem>(std::shared_ptr<const Problem>(), &problem));
  const ValueId q = plan.seq_to_head(plan.q(), Axis::kUlysses), kv = plan.seq_to_head(plan.kv(), Axis::kUlysses);
  const ValueId all = plan.fetch(kv, q, Axis::kRing);
  const Plan probe = std::move(plan).build(all);
  const int parts = problem.mesh.size(Axis::kRing);
  for (int place = 0; place < parts; ++place) {
    const int rank = problem.mesh.neighbour(0, Axis::kRing, place);
    const std::vector<Interval> wanted = probe.wanted(probe.placing(all), rank);
    std::int64_t missing = 0;
    for (const Interval& range : wanted) missing += range.count();
    for (const int near : {place - 1, place, place + 1}) {
      missing -= probe.block(kv, problem.mesh.neighbour(0, Axis::kRing, around(near, parts))).rows.inside(wanted).count();
    }
    if (missing == 0) continue;
    return {false, fmt::format("strategy halo: with mask {} and layout {} the queries of rank {} see {} keys beyond its "
                               "neighbours on the ring axis; use fetch, or layout contiguous or zigzag and a narrower window",
                               problem.mask_text, name_of(problem.layout), rank, missing)};
  }
  return {};
}

}  // namespace

Strategy halo_strategy() {
  return {"halo", "fetches the edges of the neighbouring ranks' keys, for windows",
          [](const Problem& problem) -> Support {
            const Support axes = uses(problem, "halo", {Axis::kRing, Axis::kUlysses});
            return axes.ok && problem.mesh.size(Axis::kRing) > 3 ? reaches_neighbours_only(problem) : axes;
          },
          [](PlanBuilder& plan) {
            return inside_ulysses(plan, [&](ValueId q, ValueId kv) {
              ValueId state = plan.attend(q, kv);
              for (const ValueId edge : fetch_edges(plan, q, kv)) state = plan.attend(q, edge, state);
              return state;
            });
          }};
}

}  // namespace dattn
