#include "parallel/strategy.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

void check_shape(const AttentionShape& shape) {
  require(shape.batch >= 0 && shape.seq_q >= 0 && shape.seq_kv >= 0,
          "attention shape: batch {}, seq_q {} and seq_kv {} must not be negative", shape.batch, shape.seq_q, shape.seq_kv);
  require(shape.heads >= 1 && shape.kv_heads >= 1, "attention shape: heads {} and kv_heads {} must be at least 1", shape.heads,
          shape.kv_heads);
  require(shape.heads % shape.kv_heads == 0, "query heads {} are no multiple of KV heads {}; use a multiple, for example {}",
          shape.heads, shape.kv_heads, (shape.heads / shape.kv_heads + 1) * shape.kv_heads);
  for (const std::int64_t dim : {shape.dim_qk, shape.dim_v}) {
    require(dim >= 1 && dim <= 256, "attention head dim {} is outside 1..256", dim);
  }
}

}  // namespace

const Strategy& find_strategy(std::string_view name) {
  std::string known;
  for (const Strategy& strategy : strategies()) {
    if (strategy.name == name) return strategy;
    known += fmt::format("{}, ", strategy.name);
  }
  fail(ErrorCode::kBadInput, "unknown strategy '{}'; known: {}auto", name, known);
}

Support uses(const Problem& problem, std::string_view strategy, std::initializer_list<Axis> axes) {
  for (const Axis axis : kSequenceAxes) {
    const bool used = std::find(axes.begin(), axes.end(), axis) != axes.end();
    if (used || problem.mesh.size(axis) == 1) continue;
    return {false, fmt::format("strategy {} has no use for the {} ranks of mesh.{}; use {}, or move them to mesh.{}", strategy,
                               problem.mesh.size(axis), name_of(axis), choose_strategy(problem.mesh), name_of(*axes.begin()))};
  }
  return {};
}

std::string choose_strategy(const MeshShape& mesh) {
  const bool ulysses = mesh.size(Axis::kUlysses) > 1, outer = mesh.size(Axis::kRingOuter) > 1;
  if (mesh.size(Axis::kRows) > 1) return "grid";
  if (!ulysses) return outer ? "double_ring" : "ring";
  return outer || mesh.size(Axis::kRing) > 1 ? "hybrid" : "ulysses";
}

std::shared_ptr<const Problem> make_problem(const MeshShape& mesh, const AttentionShape& shape,
                                            const AttentionOptions& options) {
  check_shape(shape);
  auto problem = std::make_shared<Problem>();
  problem->shape = shape;
  problem->scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.dim_qk)));
  require(std::isfinite(problem->scale), "attention.softmax_scale {} is not finite", problem->scale);
  problem->mask = compile_batch(options.mask, shape.batch, shape.seq_q, shape.seq_kv);
  problem->mask_text = options.mask.text();
  problem->layout = options.layout;
  problem->mesh = mesh;
  if (options.layout == Layout::kBalanced)
    problem->balanced = balanced_positions(problem->mask, shape.seq_q, mesh.sequence_parts());
  return problem;
}

Plan write_plan(const Strategy& strategy, std::shared_ptr<const Problem> problem) {
  const Support support = strategy.accepts(*problem);
  require(support.ok, "{} (mesh {})", support.why, problem->mesh.text());
  PlanBuilder builder(std::string(strategy.name), std::move(problem));
  const ValueId result = strategy.write(builder);
  return std::move(builder).build(result);
}

Plan make_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options) {
  const Strategy& strategy = find_strategy(options.strategy == "auto" ? choose_strategy(mesh) : options.strategy);
  return write_plan(strategy, make_problem(mesh, shape, options));
}

}  // namespace dattn
