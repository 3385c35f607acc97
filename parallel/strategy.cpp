#include "parallel/strategy.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "core/attention/dropout.h"
#include "core/base/error.h"
#include "core/base/log.h"
#include "parallel/planner.h"

namespace dattn {
namespace {

// Sizes up to which bytes, and pairs of a batch row, can be counted.
constexpr double kMostBytes = 0x1p53, kMostPairs = 0x1p62;
constexpr std::int64_t kMostHeads = 1 << 20;

void check_size(const AttentionShape& shape) {
  const auto batch = static_cast<double>(shape.batch), heads = static_cast<double>(shape.heads);
  const auto queries = static_cast<double>(shape.seq_q), keys = static_cast<double>(shape.seq_kv);
  require(queries * keys <= kMostPairs, "attention shape: seq_q {} x seq_kv {} are more than 2^62 pairs; use shorter sequences",
          shape.seq_q, shape.seq_kv);
  const double row = std::max(static_cast<double>(std::max(shape.dim_qk, shape.dim_v)), shape.bias ? keys : 0.0);
  require(batch * std::max(queries, keys) * heads * row * 8 <= kMostBytes,
          "attention shape: batch {} x {} positions x {} heads of {} numbers are more than 2^50 numbers; use a "
          "smaller batch, in several calls",
          shape.batch, std::max(shape.seq_q, shape.seq_kv), shape.heads, row);
}

void check_shape(const AttentionShape& shape) {
  require(shape.dtype != DType::kI32, "attention dtype is {}; use fp32, bf16, fp16 or fp64", name_of(shape.dtype));
  require(shape.batch >= 0 && shape.seq_q >= 0 && shape.seq_kv >= 0,
          "attention shape: batch {}, seq_q {} and seq_kv {} must not be negative", shape.batch, shape.seq_q, shape.seq_kv);
  require(shape.heads >= 1 && shape.kv_heads >= 1 && shape.heads <= kMostHeads && shape.kv_heads <= shape.heads,
          "attention shape: heads {} and kv_heads {} must be at least 1, heads at most {} and kv_heads at most heads",
          shape.heads, shape.kv_heads, kMostHeads);
  require(shape.heads % shape.kv_heads == 0, "query heads {} are no multiple of KV heads {}; use a multiple, for example {}",
          shape.heads, shape.kv_heads, (shape.heads / shape.kv_heads + 1) * shape.kv_heads);
  for (const std::int64_t dim : {shape.dim_qk, shape.dim_v}) {
    require(dim >= 1 && dim <= 256, "attention head dim {} is outside 1..256", dim);
  }
  check_size(shape);
}

// What scores may be made of so that they are finite in the type of sums.
double greatest_term(const AttentionShape& shape) { return accumulate_type(shape.dtype) == DType::kF64 ? 1e290 : 1e30; }

void check_terms(const AttentionShape& shape, const AttentionOptions& options) {
  const double most = greatest_term(shape);
  require(options.softcap == 0 || (options.softcap >= 1 / most && options.softcap <= most),
          "attention.softcap is {}; use a number from {:g} to {:g}, or 0 for none", options.softcap, 1 / most, most);
  require(options.alibi_slopes.empty() || static_cast<std::int64_t>(options.alibi_slopes.size()) == shape.heads,
          "attention.alibi_slopes has {} entries for {} query heads; give one for each", options.alibi_slopes.size(),
          shape.heads);
  const auto longest = static_cast<double>(std::max<std::int64_t>({1, shape.seq_q, shape.seq_kv}));
  for (const double slope : options.alibi_slopes) {
    require(std::abs(slope) * longest <= most, "attention.alibi_slopes holds {}; with {} positions use at most {:g}", slope,
            longest, most / longest);
  }
  require(options.dropout >= 0 && options.dropout < 1, "attention.dropout.p is {}; it must lie in [0, 1)", options.dropout);
  if (options.dropout == 0) return;
  require(std::max(shape.seq_q, shape.seq_kv) <= kDropoutPositions && shape.batch * shape.heads < std::int64_t{1} << 32,
          "attention dropout has room for {} positions and 2^32 rows of one head; the call has {} positions and {} rows of {} "
          "heads; use dropout p 0 or a smaller batch",
          kDropoutPositions, std::max(shape.seq_q, shape.seq_kv), shape.batch, shape.heads);
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

std::string plainest_strategy(const MeshShape& mesh) {
  const bool ulysses = mesh.size(Axis::kUlysses) > 1, outer = mesh.size(Axis::kRingOuter) > 1;
  if (mesh.size(Axis::kRows) > 1) return "grid";
  if (!ulysses) return outer ? "double_ring" : "ring";
  return outer || mesh.size(Axis::kRing) > 1 ? "hybrid" : "ulysses";
}

std::shared_ptr<const Problem> make_problem(const MeshShape& mesh, const AttentionShape& shape,
                                            const AttentionOptions& options) {
  mesh.require_valid();
  check_shape(shape);
  check_terms(shape, options);
  auto problem = std::make_shared<Problem>();
  problem->shape = shape;
  problem->scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.dim_qk)));
  require(std::abs(problem->scale) <= greatest_term(shape), "attention.softmax_scale is {}; use a number of at most {:g}",
          problem->scale, greatest_term(shape));
  problem->softcap = options.softcap;
  problem->alibi_slopes = options.alibi_slopes;
  problem->dropout = {.p = options.dropout, .seed = options.dropout_seed, .heads = shape.heads};
  problem->repeatable = options.determinism != Determinism::kOff;
  problem->invariant = options.determinism == Determinism::kInvariant || options.strategy == "invariant";
  problem->mask = compile_batch(options.mask, shape.batch, shape.seq_q, shape.seq_kv);
  problem->mask_text = options.mask.text();
  problem->layout = options.layout;
  problem->mesh = mesh;
  if (options.layout == Layout::kBalanced) problem->place_balanced();
  return problem;
}

Plan write_plan(const Strategy& strategy, std::shared_ptr<const Problem> problem) {
  const Support support = strategy.accepts(*problem);
  require(support.ok, "{} (mesh {})", support.why, problem->mesh.text());
  PlanBuilder builder(std::string(strategy.name), std::move(problem));
  const ValueId result = strategy.write(builder);
  return std::move(builder).build(result);
}

void tell_replaced_strategy(const AttentionOptions& options, const Plan& plan) {
  if (options.strategy == "auto" || options.strategy == plan.strategy) return;
  note_once(fmt::format("determinism: invariant replaces strategy {} by its own; with determinism: repeatable it is kept",
                        options.strategy),
            LogLevel::kInfo);
}

Plan make_plan(const MeshShape& mesh, const AttentionShape& shape, const AttentionOptions& options) {
  const bool automatic = options.strategy == "auto", invariant = options.determinism == Determinism::kInvariant;
  if (automatic && !invariant) return make_auto_plan(mesh, shape, options);
  if (!automatic) find_strategy(options.strategy);
  return write_plan(find_strategy(invariant ? "invariant" : options.strategy), make_problem(mesh, shape, options));
}

}  // namespace dattn
