#include "parallel/plan.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/base/error.h"

namespace dattn {
namespace {

// The rows of several ranks as one block: runs in ascending order, neighbours joined.
Positions merge_rows(const std::vector<Positions>& parts) {
  std::vector<Run> runs;
  for (const Positions& part : parts) runs.insert(runs.end(), part.runs().begin(), part.runs().end());
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  std::vector<Run> joined;
  for (const Run& run : runs) {
    const bool extends = !joined.empty() && joined.back().step == 1 && run.step == 1 && joined.back().last() + 1 == run.begin;
    if (extends) {
      joined.back().count += run.count;
    } else {
      joined.push_back(run);
    }
  }
  return Positions(joined);
}

HeadRange split_heads(const HeadRange& heads, std::int64_t group, int parts, int index) {
  const Interval share = split_evenly(heads.q.count(), parts, index);
  const Interval q{heads.q.begin + share.begin, heads.q.begin + share.end};
  if (q.count() == 0) return {q, {heads.kv.begin, heads.kv.begin}};
  return {q, {q.begin / group, (q.end - 1) / group + 1}};
}

}  // namespace

HeadRange heads_of(std::int64_t heads, std::int64_t kv_heads, int parts, int index) {
  return split_heads({{0, heads}, {0, kv_heads}}, heads / kv_heads, parts, index);
}

std::string_view name_of(Verb verb) {
  switch (verb) {
    case Verb::kAttend: return "attend";
    case Verb::kFinish: return "finish";
    case Verb::kAttendGrad: return "attend_grad";
    case Verb::kAdd: return "add";
    case Verb::kRotate: return "rotate";
    case Verb::kGather: return "gather";
    case Verb::kReduceScatter: return "reduce_scatter";
    case Verb::kSeqToHead: return "seq_to_head";
    case Verb::kHeadToSeq: return "head_to_seq";
  }
  return "?";
}

std::string_view name_of(What what) {
  switch (what) {
    case What::kQuery: return "q";
    case What::kKeyValue: return "kv";
    case What::kState: return "state";
    case What::kResult: return "out";
    case What::kGradOut: return "dout";
    case What::kGradQuery: return "dq";
    case What::kGradKeyValue: return "dkv";
  }
  return "?";
}

// Statistics stand first: they are at least as strictly aligned as what follows them in a packed value.
std::vector<Field> fields_of(What what, const AttentionShape& shape) {
  const DType storage = shape.dtype, sum = accumulate_type(shape.dtype);
  switch (what) {
    case What::kQuery: return {{"q", storage, shape.dim_qk}};
    case What::kKeyValue: return {{"k", storage, shape.dim_qk}, {"v", storage, shape.dim_v}};
    case What::kState: return {{"lse", sum, 1, true}, {"out", sum, shape.dim_v}};
    case What::kResult: return {{"lse", sum, 1, true}, {"out", storage, shape.dim_v}};
    case What::kGradOut: return {{"lse", sum, 1, true}, {"delta", sum, 1, true}, {"dout", storage, shape.dim_v}};
    case What::kGradQuery: return {{"dq", sum, shape.dim_qk}};
    case What::kGradKeyValue: return {{"dk", sum, shape.dim_qk}, {"dv", sum, shape.dim_v}};
  }
  return {};
}

Block Plan::block(ValueId value, int rank) const {
  const MeshShape& mesh = problem->mesh;
  const AttentionShape& shape = problem->shape;
  const Value& v = values[static_cast<std::size_t>(value)];
  const Placing& placing = v.placing;
  const int coordinate = mesh.coordinate(rank, placing.axis), parts = mesh.size(placing.axis);
  switch (placing.kind) {
    case Placing::Kind::kShard: {
      const std::int64_t length = is_key_side(v.what) ? shape.seq_kv : shape.seq_q;
      return {positions_of(problem->layout, length, mesh.sequence_parts(), mesh.sequence_index(rank)),
              heads_of(shape.heads, shape.kv_heads, mesh.size(Axis::kTensor), mesh.coordinate(rank, Axis::kTensor))};
    }
    case Placing::Kind::kRotated: {
      const int from = ((coordinate - placing.shift) % parts + parts) % parts;
      return block(placing.base, mesh.neighbour(rank, placing.axis, from));
    }
    case Placing::Kind::kGathered:
    case Placing::Kind::kHeadSplit: {
      Block all;
      std::vector<Positions> rows;
      for (int i = 0; i < parts; ++i) {
        Block part = block(placing.base, mesh.neighbour(rank, placing.axis, i));
        rows.push_back(std::move(part.rows));
        all.heads = part.heads;
      }
      all.rows = merge_rows(rows);
      if (placing.kind == Placing::Kind::kHeadSplit) {
        all.heads = split_heads(all.heads, shape.heads / shape.kv_heads, parts, coordinate);
      }
      return all;
    }
    case Placing::Kind::kLike: return block(placing.base, rank);
  }
  return {};
}

std::string Plan::value_name(ValueId value) const {
  if (value == kNoValue) return "-";
  const What what = values[static_cast<std::size_t>(value)].what;
  int number = 0;
  for (ValueId i = 0; i < value; ++i) number += values[static_cast<std::size_t>(i)].what == what ? 1 : 0;
  return number == 0 ? std::string(name_of(what)) : fmt::format("{}{}", name_of(what), number);
}

std::string Plan::text() const {
  std::string lines;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    std::vector<std::string> in, out;
    for (const ValueId value : step.in) in.push_back(value_name(value));
    for (const ValueId value : step.out) out.push_back(value_name(value));
    std::string verb(name_of(step.verb));
    if (is_move(step.verb))
      verb += fmt::format("[{}{}]", name_of(step.axis), step.verb == Verb::kRotate ? fmt::format(" {:+}", step.shift) : "");
    lines += fmt::format("{:4}  {} = {}({})\n", i, fmt::join(out, ", "), verb, fmt::join(in, ", "));
  }
  return lines;
}

PlanBuilder::PlanBuilder(std::string strategy, std::shared_ptr<const Problem> problem) {
  plan_.strategy = std::move(strategy);
  plan_.problem = std::move(problem);
  plan_.inputs = {add_value(What::kQuery, {}), add_value(What::kKeyValue, {})};
}

ValueId PlanBuilder::add_value(What what, Placing placing) {
  plan_.values.push_back({what, placing});
  return static_cast<ValueId>(plan_.values.size()) - 1;
}

void PlanBuilder::add_step(Verb verb, std::vector<ValueId> in, std::vector<ValueId> out, Axis axis, int shift) {
  plan_.steps.push_back({verb, std::move(in), std::move(out), axis, shift});
}

ValueId PlanBuilder::move(Verb verb, ValueId value, Axis axis, int shift, Placing placing) {
  const ValueId moved = add_value(plan_.values[static_cast<std::size_t>(value)].what, placing);
  add_step(verb, {value}, {moved}, axis, shift);
  return moved;
}

ValueId PlanBuilder::attend(ValueId q, ValueId kv, ValueId state) {
  const ValueId next = add_value(What::kState, {Placing::Kind::kLike, q});
  std::vector<ValueId> in{q, kv};
  if (state != kNoValue) in.push_back(state);
  add_step(Verb::kAttend, std::move(in), {next});
  return next;
}

ValueId PlanBuilder::rotate(ValueId value, Axis axis, int shift) {
  if (size(axis) == 1) return value;
  const Placing& from = plan_.values[static_cast<std::size_t>(value)].placing;
  const bool further = from.kind == Placing::Kind::kRotated && from.axis == axis;
  const Placing placing =
      further ? Placing{from.kind, from.base, axis, from.shift + shift} : Placing{Placing::Kind::kRotated, value, axis, shift};
  return move(Verb::kRotate, value, axis, shift, placing);
}

ValueId PlanBuilder::gather(ValueId value, Axis axis) {
  if (size(axis) == 1) return value;
  return move(Verb::kGather, value, axis, 0, {Placing::Kind::kGathered, value, axis});
}

ValueId PlanBuilder::seq_to_head(ValueId value, Axis axis) {
  if (size(axis) == 1) return value;
  return move(Verb::kSeqToHead, value, axis, 0, {Placing::Kind::kHeadSplit, value, axis});
}

ValueId PlanBuilder::finish(ValueId state) {
  const ValueId result = add_value(What::kResult, {Placing::Kind::kLike, state});
  add_step(Verb::kFinish, {state}, {result});
  return result;
}

ValueId PlanBuilder::head_to_seq(ValueId result, Axis axis, ValueId like) {
  if (size(axis) == 1) return result;
  return move(Verb::kHeadToSeq, result, axis, 0, {Placing::Kind::kLike, like});
}

Plan PlanBuilder::build(ValueId result) && {
  plan_.outputs = {result};
  return std::move(plan_);
}

}  // namespace dattn
