#include "parallel/plan.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/base/error.h"

namespace dattn {
namespace {

// The range that runs of step n cover together, where there are n of them and each position occurs: begin + i, stepping n.
std::optional<Interval> woven_range(const std::vector<Run>& runs) {
  if (runs.empty()) return std::nullopt;
  Interval range{runs[0].begin, runs[0].begin};
  std::int64_t count = 0;
  for (const Run& run : runs) {
    if (run.step != static_cast<std::int64_t>(runs.size()) && run.count > 1) return std::nullopt;
    range = {std::min(range.begin, run.begin), std::max(range.end, run.last() + 1)};
    count += run.count;
  }
  // Positions of one list are distinct, so as many positions as the range holds fill it.
  return runs.size() > 1 && count == range.count() ? std::optional(range) : std::nullopt;
}

// The rows of several ranks as one block: runs in ascending order, neighbours joined. `weave`: strided runs that fill a
// range together become that range; else they stay strides, which fit those of a block that stayed where it was.
Positions merge_rows(const std::vector<Positions>& parts, bool weave) {
  std::vector<Run> runs;
  for (const Positions& part : parts) runs.insert(runs.end(), part.runs().begin(), part.runs().end());
  const auto range = weave ? woven_range(runs) : std::nullopt;
  if (range) return Positions::range(range->begin, range->end);
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
    case Verb::kFetch: return "fetch";
    case Verb::kReduceScatter: return "reduce_scatter";
    case Verb::kCombine: return "combine";
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

namespace {

// A bias travels with its query rows.
std::vector<Field> with_bias(std::vector<Field> fields, std::string_view name, DType dtype, const AttentionShape& shape) {
  if (shape.bias) fields.push_back({name, dtype, shape.seq_kv, false, !shape.bias->per_batch, !shape.bias->per_head});
  return fields;
}

}  // namespace

// Statistics stand first: they are at least as strictly aligned as what follows them in a packed value.
std::vector<Field> fields_of(What what, const AttentionShape& shape) {
  const DType storage = shape.dtype, sum = accumulate_type(shape.dtype);
  switch (what) {
    case What::kQuery: return with_bias({{"q", storage, shape.dim_qk}}, "bias", storage, shape);
    case What::kKeyValue: return {{"k", storage, shape.dim_qk}, {"v", storage, shape.dim_v}};
    case What::kState: return {{"lse", sum, 1, true}, {"out", sum, shape.dim_v}};
    case What::kResult: return {{"lse", sum, 1, true}, {"out", storage, shape.dim_v}};
    case What::kGradOut: return {{"lse", sum, 1, true}, {"delta", sum, 1, true}, {"dout", storage, shape.dim_v}};
    case What::kGradQuery: return with_bias({{"dq", sum, shape.dim_qk}}, "dbias", sum, shape);
    case What::kGradKeyValue: return {{"dk", sum, shape.dim_qk}, {"dv", sum, shape.dim_v}};
  }
  return {};
}

std::vector<Field> message_fields(Verb verb, What what, const AttentionShape& shape) {
  return fields_of(verb == Verb::kCombine ? What::kResult : what, shape);
}

bool Placing::comes_from(int peer, int own, int parts) const {
  return peer != own && (shift == 0 || peer == around(own - shift, parts));
}

Positions Problem::shard_rows(bool key_side, int rank) const { return part_rows(key_side, mesh.sequence_index(rank)); }

void Problem::place_balanced() {
  balanced = std::make_shared<const std::vector<Positions>>(balanced_positions(mask, shape.seq_q, mesh.sequence_parts()));
}

Positions Problem::part_rows(bool key_side, int part) const {
  const std::int64_t length = key_side ? shape.seq_kv : shape.seq_q;
  const int parts = mesh.sequence_parts();
  if (layout != Layout::kBalanced) return positions_of(layout, length, parts, part);
  // Keys lie where their queries lie, or, in cross-attention of unequal lengths, in order.
  if (!key_side || shape.seq_q == shape.seq_kv) return (*balanced)[static_cast<std::size_t>(part)];
  return positions_of(Layout::kContiguous, length, parts, part);
}

Shape field_shape(const Field& field, std::int64_t batch, std::int64_t rows, std::int64_t heads) {
  if (field.statistic) return {batch, heads, rows};
  return {field.one_batch ? std::min<std::int64_t>(batch, 1) : batch, rows,
          field.one_head ? std::min<std::int64_t>(heads, 1) : heads, field.width};
}

const Placing& Plan::placing(ValueId value) const {
  const Placing& placing = values[static_cast<std::size_t>(value)].placing;
  return placing.kind == Placing::Kind::kLike ? this->placing(placing.base) : placing;
}

std::vector<Interval> Plan::wanted(const Placing& fetched, int rank) const {
  return seen_keys(problem->mask, rows(fetched.wanted, rank));
}

HeadRange Plan::heads(ValueId value, int rank) const {
  const MeshShape& mesh = problem->mesh;
  const AttentionShape& shape = problem->shape;
  const Placing& placing = values[static_cast<std::size_t>(value)].placing;
  if (placing.kind == Placing::Kind::kShard)
    return heads_of(shape.heads, shape.kv_heads, mesh.size(Axis::kTensor), mesh.coordinate(rank, Axis::kTensor));
  const HeadRange all = heads(placing.base, rank);  // equal along every sequence axis until they are split
  if (placing.kind != Placing::Kind::kHeadSplit) return all;
  return split_heads(all, shape.heads / shape.kv_heads, mesh.size(placing.axis), mesh.coordinate(rank, placing.axis));
}

Block Plan::block(ValueId value, int rank) const {
  const Placing& placing = values[static_cast<std::size_t>(value)].placing;
  const auto on = [&](int back) {
    const int parts = problem->mesh.size(placing.axis), own = problem->mesh.coordinate(rank, placing.axis);
    return problem->mesh.neighbour(rank, placing.axis, around(own - back, parts));
  };
  if (placing.kind == Placing::Kind::kLike) return block(placing.base, rank);
  if (placing.kind == Placing::Kind::kRotated) return block(placing.base, on(placing.shift));
  return {rows(value, rank), heads(value, rank)};
}

Positions Plan::rows(ValueId value, int rank) const {
  const MeshShape& mesh = problem->mesh;
  const Value& v = values[static_cast<std::size_t>(value)];
  const Placing& placing = v.placing;
  if (placing.kind == Placing::Kind::kShard) return problem->shard_rows(is_key_side(v.what), rank);
  if (placing.kind == Placing::Kind::kLike) return rows(placing.base, rank);
  const int coordinate = mesh.coordinate(rank, placing.axis), parts = mesh.size(placing.axis);
  const auto base_on = [&](int other) { return rows(placing.base, mesh.neighbour(rank, placing.axis, other)); };
  if (placing.kind == Placing::Kind::kRotated) return base_on(around(coordinate - placing.shift, parts));
  if (placing.kind == Placing::Kind::kFetched) {
    const std::vector<Interval> seen = wanted(placing, rank);
    std::vector<Run> runs;
    for (int i = 0; i < parts; ++i) {
      if (!placing.comes_from(i, coordinate, parts)) continue;
      const Positions part = base_on(i).inside(seen);
      runs.insert(runs.end(), part.runs().begin(), part.runs().end());
    }
    return Positions(runs);
  }
  std::vector<Positions> parts_of_axis;  // gathered, or split by heads: then q and kv alike
  for (int i = 0; i < parts; ++i) parts_of_axis.push_back(base_on(i));
  return merge_rows(parts_of_axis, placing.kind == Placing::Kind::kHeadSplit || problem->invariant);
}

std::string Plan::value_name(ValueId value) const {
  if (value == kNoValue) return "-";
  if (value < 0 || value >= static_cast<ValueId>(values.size())) return fmt::format("value {}", value);  // of a broken plan
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
      verb += fmt::format("[{}{}]", name_of(step.axis), step.shift != 0 ? fmt::format(" {:+}", step.shift) : "");
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

ValueId PlanBuilder::gather_sequence(ValueId value) {
  for (auto axis = kSequenceAxes.rbegin(); axis != kSequenceAxes.rend(); ++axis) value = gather(value, *axis);
  return value;
}

ValueId PlanBuilder::fetch(ValueId kv, ValueId q, Axis axis, int from) {
  return move(Verb::kFetch, kv, axis, from, {Placing::Kind::kFetched, kv, axis, from, q});
}

ValueId PlanBuilder::combine(ValueId state, Axis axis, ValueId like) {
  if (size(axis) == 1) return state;
  return move(Verb::kCombine, state, axis, 0, {Placing::Kind::kLike, like});
}

ValueId PlanBuilder::add(ValueId a, ValueId b) {
  const ValueId sum = add_value(plan_.values[static_cast<std::size_t>(a)].what, {Placing::Kind::kLike, a});
  add_step(Verb::kAdd, {a, b}, {sum});
  return sum;
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
