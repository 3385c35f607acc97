#include "parallel/requirements.h"

#include <algorithm>

#include <fmt/format.h>

#include "parallel/strategy.h"

namespace dattn {

Support uses(const Problem& problem, std::string_view strategy, std::initializer_list<Axis> axes) {
  for (const Axis axis : kSequenceAxes) {
    const bool used = std::find(axes.begin(), axes.end(), axis) != axes.end();
    if (used || problem.mesh.size(axis) == 1) continue;
    return {false,
            fmt::format("strategy {} has no use for the {} ranks of mesh.{}; use {}, or move them to mesh.{}", strategy,
                        problem.mesh.size(axis), name_of(axis), plainest_strategy(problem.mesh), name_of(*axes.begin()))};
  }
  return {};
}

std::int64_t keys_beyond_neighbours(const Problem& problem, int place) {
  const int parts = problem.mesh.size(Axis::kRing);
  if (parts <= 3) return 0;  // the neighbours are all there are
  PlanBuilder builder("", std::shared_ptr<const Problem>(std::shared_ptr<const Problem>(), &problem));
  const ValueId q = builder.seq_to_head(builder.q(), Axis::kUlysses), kv = builder.seq_to_head(builder.kv(), Axis::kUlysses);
  const Plan plan = std::move(builder).build(q);
  const auto rank_at = [&](int i) { return problem.mesh.neighbour(0, Axis::kRing, around(i, parts)); };
  const std::vector<Interval> seen = seen_keys(problem.mask, plan.rows(q, rank_at(place)));
  std::int64_t beyond = 0;
  for (const Interval& range : seen) beyond += range.count();
  for (const int near : {place - 1, place, place + 1}) beyond -= plan.rows(kv, rank_at(near)).inside(seen).count();
  return beyond;
}

Support sees_neighbours_only(const Problem& problem, std::string_view strategy) {
  for (int place = 0; place < problem.mesh.size(Axis::kRing); ++place) {
    const std::int64_t beyond = keys_beyond_neighbours(problem, place);
    if (beyond == 0) continue;
    return {false, fmt::format("strategy {}: with mask {} and layout {} the queries of rank {} see {} keys beyond its "
                               "neighbours on the ring axis; use fetch, or layout contiguous or zigzag and a narrower window",
                               strategy, problem.mask_text, name_of(problem.layout),
                               problem.mesh.neighbour(0, Axis::kRing, place), beyond)};
  }
  return {};
}

Support keeps_head_groups(const Problem& problem, std::string_view what) {
  const AttentionShape& shape = problem.shape;
  const std::int64_t group = shape.heads / shape.kv_heads;
  const int parts = problem.mesh.size(Axis::kTensor);
  for (int part = 0; part < parts; ++part) {
    const Interval heads = heads_of(shape.heads, shape.kv_heads, parts, part).q;
    if (heads.count() == 0 || (heads.begin % group == 0 && heads.end % group == 0)) continue;
    return {false, fmt::format("{}: mesh.tensor {} cuts through a group of {} query heads, whose gradients would be added in "
                               "another order; use at most {} tensor ranks",
                               what, parts, group, shape.kv_heads)};
  }
  return {};
}

}  // namespace dattn
