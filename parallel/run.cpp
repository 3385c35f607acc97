#include "parallel/run.h"

#include <algorithm>

#include "core/attention/state.h"
#include "core/base/error.h"
#include "parallel/comm/trace.h"

namespace dattn {
namespace {

Arrival arrival_of(Verb verb) {
  if (verb == Verb::kCombine) return Arrival::kMerge;
  return verb == Verb::kReduceScatter || verb == Verb::kHeadToSeq ? Arrival::kSum : Arrival::kCopy;
}

// A stretch of batch rows that sees something.
struct Stretch {
  const BatchTiles& part;

  // Its part of field number `field`; nothing where the value lacks it. What is one for all batch rows stays whole.
  TensorView cut(const ValueData& value, std::size_t field) const {
    if (field >= value.fields.size()) return {};
    const TensorView& view = value.fields[field];
    return view.size(0) == 1 ? view : view.slice(0, part.batch.begin, part.batch.count());
  }

  ScoreTerms cut(ScoreTerms terms, const ValueData& q) const {
    terms.bias = cut(q, 1);
    terms.dropout.batch_begin += part.batch.begin;
    return terms;
  }
};

}  // namespace

Runner::Runner(const Plan& plan, const RankPlan& mine, const Mesh& mesh, const AttentionKernel& kernel)
    : plan_(plan), mine_(mine), mesh_(mesh), kernel_(kernel), last_use_(last_uses(plan)) {
  producer_.assign(plan.values.size(), -1);
  travels_.assign(plan.values.size(), false);
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (!is_move(step.verb)) continue;
    producer_[static_cast<std::size_t>(step.out[0])] = static_cast<int>(i);
    if (step.verb != Verb::kRotate) continue;
    travels_[static_cast<std::size_t>(step.in[0])] = true;
    travels_[static_cast<std::size_t>(step.out[0])] = true;
  }
}

ValueData Runner::allocate(ValueId value, bool zero) const {
  const Block& held = block(value);
  const auto fields = fields_of(what(value), plan_.problem->shape);
  const std::int64_t batch = plan_.problem->shape.batch, rows = held.rows.count(), heads = held.heads_for(what(value)).count();
  ValueData made;
  if (travels_[static_cast<std::size_t>(value)]) {
    const std::int64_t bytes = bytes_of(plan_, value, held);
    made.packed = Tensor::uninitialized(DType::kBF16, {bytes / 2});
    char* cursor = made.packed.ptr<char>();
    for (const Field& field : fields) {
      made.fields.emplace_back(cursor, field.dtype, field_shape(field, batch, rows, heads), made.packed->device);
      cursor += made.fields.back().bytes();
    }
    if (zero) fill_zero(made.packed);
    return made;
  }
  for (const Field& field : fields) {
    const Shape shape = field_shape(field, batch, rows, heads);
    made.owned.push_back(zero ? Tensor(field.dtype, shape) : Tensor::uninitialized(field.dtype, shape));
    made.fields.push_back(made.owned.back().view());
  }
  return made;
}

ValueData Runner::take(ValueId value) {
  need(value);
  for (std::size_t i = 0; i < transfers_.size(); ++i) {
    if (transfers_[i].state == Transfer::State::kUnderWay && plan_.steps[i].in[0] == value) finish_move(i);
  }
  return std::exchange(data(value), ValueData{});
}

bool Runner::available(ValueId value) const {
  if (value == kNoValue) return true;
  const int producer = producer_[static_cast<std::size_t>(value)];
  if (producer >= 0) return transfers_[static_cast<std::size_t>(producer)].state == Transfer::State::kDone;
  return !data_[static_cast<std::size_t>(value)].fields.empty();
}

std::vector<ValueData> Runner::run(const std::vector<std::vector<TensorView>>& inputs, const AttentionCall& call) {
  call_ = call;
  data_.clear();
  data_.resize(plan_.values.size());
  transfers_.clear();
  transfers_.resize(plan_.steps.size());
  for (std::size_t i = 0; i < plan_.inputs.size(); ++i) data(plan_.inputs[i]).fields = inputs[i];
  for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
    const Step& step = plan_.steps[i];
    position_ = static_cast<int>(i);
    if (is_move(step.verb)) {
      if (transfers_[i].state == Transfer::State::kWaiting) {
        need(step.in[0]);
        start_move(i);
      }
      continue;
    }
    for (const ValueId value : step.in) need(value);
    start_ready_moves(i + 1);
    compute(i);
    for (const ValueId value : step.in) release_if_used(value);
  }
  std::vector<ValueData> outputs;
  for (const ValueId value : plan_.outputs) outputs.push_back(take(value));
  for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
    if (transfers_[i].state == Transfer::State::kUnderWay) finish_move(i);  // sends that nobody here waits for
  }
  data_.clear();
  return outputs;
}

void Runner::start_ready_moves(std::size_t from) {
  for (std::size_t i = from; i < plan_.steps.size(); ++i) {
    const Step& step = plan_.steps[i];
    if (is_move(step.verb) && transfers_[i].state == Transfer::State::kWaiting && available(step.in[0])) start_move(i);
  }
}

void Runner::need(ValueId value) {
  if (value == kNoValue) return;
  const int producer = producer_[static_cast<std::size_t>(value)];
  if (producer >= 0) finish_move(static_cast<std::size_t>(producer));
}

FieldSet Runner::field_set(ValueId value, std::span<const Field> fields) {
  return {fields, data(value).fields, plan_.problem->shape.batch, block(value).heads_for(what(value)).begin};
}

OpLabel Runner::label(std::size_t index) const {
  return {name_of(plan_.steps[index].verb), call_.layer, static_cast<int>(index)};
}

// Packs what goes to each peer into one message. A rotation sends a value that lies in one block of memory as it is, and
// receives into such a block.
void Runner::start_move(std::size_t index) {
  const WorkSpan span(mesh_.world().trace(), label(index), "start of");
  const Step& step = plan_.steps[index];
  const RankStep& mine = mine_.steps[index];
  Transfer& transfer = transfers_[index];
  const bool rotates = step.verb == Verb::kRotate;
  const int own = mesh_.coordinate(step.axis);
  const std::vector<Field> fields = message_fields(step.verb, what(step.out[0]), plan_.problem->shape);
  const Arrival arrival = arrival_of(step.verb);
  ValueData& out = data(step.out[0]) = allocate(step.out[0], arrival == Arrival::kSum);
  if (arrival == Arrival::kMerge) clear_state(out.fields[1], out.fields[0]);
  const FieldSet from = field_set(step.in[0], fields);
  const auto message_of = [&](std::span<const Piece> pieces) -> TensorView {
    transfer.buffers.push_back(Tensor::uninitialized(DType::kBF16, {message_bytes(fields, from.batch, pieces) / 2}));
    return transfer.buffers.back();
  };
  std::vector<SendPart> sends;
  for (const auto pieces : by_peer(mine.sends)) {
    if (pieces[0].peer == own) continue;
    const Tensor& whole = data(step.in[0]).packed;
    const bool in_place = rotates && whole.defined();
    const TensorView message = in_place ? whole.view() : message_of(pieces);
    if (!in_place) pack(from, pieces, message);
    sends.push_back({pieces[0].peer, message.data, static_cast<std::size_t>(message.bytes()), message.device});
  }
  std::vector<RecvPart> receives;
  for (const auto pieces : by_peer(mine.receives)) {
    if (pieces[0].peer == own) continue;
    const TensorView message = rotates ? data(step.out[0]).packed.view() : message_of(pieces);
    transfer.received.push_back(message);
    receives.push_back({pieces[0].peer, message.data, static_cast<std::size_t>(message.bytes()), message.device});
  }
  transfer.ticket = mesh_.axis(step.axis).start(sends, receives, label(index));
  transfer.state = Transfer::State::kUnderWay;
}

// Waits, then puts the pieces of every peer, in rank order, into their places.
void Runner::finish_move(std::size_t index) {
  Transfer& transfer = transfers_[index];
  if (transfer.state == Transfer::State::kDone) return;
  const Step& step = plan_.steps[index];
  if (transfer.state == Transfer::State::kWaiting) {
    need(step.in[0]);
    start_move(index);
  }
  mesh_.axis(step.axis).wait(transfer.ticket);
  if (step.verb != Verb::kRotate) place_pieces(index);
  transfer.buffers.clear();
  transfer.state = Transfer::State::kDone;
  const bool in_use = last_use_[static_cast<std::size_t>(step.in[0])] == position_;  // by the step that waits
  if (!in_use) release_if_used(step.in[0]);
}

void Runner::place_pieces(std::size_t index) {
  const WorkSpan span(mesh_.world().trace(), label(index), "end of");
  const Step& step = plan_.steps[index];
  const RankStep& mine = mine_.steps[index];
  const std::vector<Field> fields = message_fields(step.verb, what(step.out[0]), plan_.problem->shape);
  const FieldSet from = field_set(step.in[0], fields), to = field_set(step.out[0], fields);
  const int own = mesh_.coordinate(step.axis);
  const auto sent = by_peer(mine.sends);
  auto received = transfers_[index].received.begin();
  for (const auto pieces : by_peer(mine.receives)) {
    if (pieces[0].peer != own) {
      unpack(*received++, pieces, to, arrival_of(step.verb));
      continue;
    }
    const auto stays = std::find_if(sent.begin(), sent.end(), [&](const auto& group) { return group[0].peer == own; });
    move_within(from, *stays, to, pieces, arrival_of(step.verb));
  }
}

bool Runner::being_sent(ValueId value) const {
  for (std::size_t i = 0; i < transfers_.size(); ++i) {
    if (transfers_[i].state == Transfer::State::kUnderWay && plan_.steps[i].in[0] == value) return true;
  }
  return false;
}

void Runner::release_if_used(ValueId value) {
  if (value == kNoValue || last_use_[static_cast<std::size_t>(value)] > position_ || being_sent(value)) return;
  data(value) = {};
}

void Runner::compute(std::size_t index) {
  const WorkSpan span(mesh_.world().trace(), label(index));
  const Step& step = plan_.steps[index];
  switch (step.verb) {
    case Verb::kAttend: return attend(step, mine_.steps[index]);
    case Verb::kAttendGrad: return attend_grad(step, mine_.steps[index]);
    case Verb::kFinish: return finish_state(step);
    case Verb::kAdd: return add_values(step);
    default: fail(ErrorCode::kInternal, "{} is no computation", name_of(step.verb));
  }
}

void Runner::attend(const Step& step, const RankStep& mine) {
  const std::vector<BatchTiles>& tiles = mine.tiles();
  const bool whole = tiles.size() == 1 && tiles[0].batch.count() == plan_.problem->shape.batch;
  bool merge = step.in.size() > 2;
  ValueData state = merge ? take(step.in[2]) : allocate(step.out[0], false);
  if (!merge && !whole) {
    clear_state(state.fields[1], state.fields[0]);
    merge = true;
  }
  const ValueData &q = data(step.in[0]), &kv = data(step.in[1]);
  for (const BatchTiles& part : tiles) {
    const Stretch stretch{part};
    kernel_.attend({.q = stretch.cut(q, 0),
                    .k = stretch.cut(kv, 0),
                    .v = stretch.cut(kv, 1),
                    .heads = mine.heads,
                    .tiles = part.tiles,
                    .scale = plan_.problem->scale,
                    .out = stretch.cut(state, 1),
                    .lse = stretch.cut(state, 0),
                    .merge = merge,
                    .terms = stretch.cut(terms(), q),
                    .invariant = plan_.problem->invariant});
  }
  data(step.out[0]) = std::move(state);
}

void Runner::attend_grad(const Step& step, const RankStep& mine) {
  const auto accumulator = [&](std::size_t input, std::size_t output) {
    if (step.out[output] == kNoValue) return ValueData{};
    return step.in[input] != kNoValue ? take(step.in[input]) : allocate(step.out[output], true);
  };
  ValueData dq = accumulator(3, 0), dkv = accumulator(4, 1);
  const ValueData &q = data(step.in[0]), &kv = data(step.in[1]), &dout = data(step.in[2]);
  for (const BatchTiles& part : mine.tiles()) {
    const Stretch stretch{part};
    kernel_.attend_grad({.q = stretch.cut(q, 0),
                         .k = stretch.cut(kv, 0),
                         .v = stretch.cut(kv, 1),
                         .heads = mine.heads,
                         .tiles = part.tiles,
                         .scale = plan_.problem->scale,
                         .dout = stretch.cut(dout, 2),
                         .lse = stretch.cut(dout, 0),
                         .delta = stretch.cut(dout, 1),
                         .dq = stretch.cut(dq, 0),
                         .dk = stretch.cut(dkv, 0),
                         .dv = stretch.cut(dkv, 1),
                         .terms = stretch.cut(terms(), q),
                         .invariant = plan_.problem->invariant,
                         .dbias = stretch.cut(dq, 1),
                         .repeatable = plan_.problem->repeatable});
  }
  if (step.out[0] != kNoValue) data(step.out[0]) = std::move(dq);
  if (step.out[1] != kNoValue) data(step.out[1]) = std::move(dkv);
}

// But for the bias, which comes with the queries.
ScoreTerms Runner::terms() const {
  const Problem& problem = *plan_.problem;
  ScoreTerms terms{.softcap = problem.softcap, .alibi_slopes = problem.alibi_slopes, .dropout = problem.dropout};
  terms.dropout.stream = call_.dropout_stream;
  terms.dropout.batch_begin = call_.batch_begin;
  return terms;
}

void Runner::finish_state(const Step& step) {
  ValueData state = take(step.in[0]);
  if (call_.sink.data != nullptr) {
    const Interval &heads = block(step.in[0]).heads.q, &own = block(0).heads.q;  // of all heads held before ulysses
    merge_sink(state.fields[1], state.fields[0], call_.sink.slice(0, heads.begin - own.begin, heads.count()));
  }
  const DType storage = plan_.problem->shape.dtype;
  if (state.fields[1].dtype != storage) {
    state.owned[1] = to_dtype(state.fields[1], storage);
    state.fields[1] = state.owned[1].view();
  }
  data(step.out[0]) = std::move(state);
}

void Runner::add_values(const Step& step) {
  ValueData sum = take(step.in[0]);
  const ValueData& other = data(step.in[1]);
  if (what(step.in[0]) == What::kState) {
    merge_state(sum.fields[1], sum.fields[0], other.fields[1], other.fields[0]);
  } else {
    for (std::size_t f = 0; f < sum.fields.size(); ++f) add(other.fields[f], sum.fields[f]);
  }
  data(step.out[0]) = std::move(sum);
}

}  // namespace dattn
