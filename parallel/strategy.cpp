#include "parallel/strategy.h"

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

const Strategy& find_strategy(const std::string& name) {
  std::string known;
  for (const Strategy& strategy : strategies()) {
    if (strategy.name == name) return strategy;
    known += fmt::format("{}, ", strategy.name);
  }
  fail(ErrorCode::kBadInput, "unknown strategy '{}'; known: {}auto", name, known);
}

}  // namespace

std::string choose_strategy(const MeshShape& mesh) {
  if (mesh.size(Axis::kUlysses) == 1) return "ring";
  return mesh.size(Axis::kRing) == 1 ? "ulysses" : "hybrid";
}

Plan make_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options) {
  check_shape(shape);
  const Strategy& strategy = find_strategy(options.strategy == "auto" ? choose_strategy(mesh) : options.strategy);
  const Support support = strategy.accepts(mesh);
  require(support.ok, "{} (mesh {})", support.why, mesh.text());
  auto problem = std::make_shared<Problem>();
  problem->shape = shape;
  problem->scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.dim_qk)));
  require(std::isfinite(problem->scale), "attention.softmax_scale {} is not finite", problem->scale);
  problem->mask = compile(options.mask, shape.seq_q, shape.seq_kv);
  problem->mask_text = options.mask.text();
  problem->layout = options.layout;
  problem->mesh = mesh;
  PlanBuilder builder(std::string(strategy.name), std::move(problem));
  const ValueId result = strategy.write(builder);
  return std::move(builder).build(result);
}

}  // namespace dattn
