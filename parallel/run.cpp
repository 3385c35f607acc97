#include "parallel/run.h"

#include <algorithm>

#include "core/attention/state.h"
#include "core/base/error.h"

namespace dattn {
namespace {

// Part of a field: a range of rows and of heads (counted from the block's first).
TensorView part_of(const TensorView& field, bool statistic, std::int64_t row, std::int64_t rows, std::int64_t head, std::int64_t heads) {
  return statistic ? field.slice(1, head, heads).slice(2, row, rows) : field.slice(1, row, rows).slice(2, head, heads);
}

bool covers(const Piece& piece, const Block& block, What what) {
  return piece.rows == block.rows.count() && piece.heads == block.heads_for(what);
}

Shape field_shape(const Field& field, std::int64_t batch, std::int64_t rows, std::int64_t heads) {
  return field.statistic ? Shape{batch, heads, rows} : Shape{batch, rows, heads, field.width};
}

// Views of the fields of one piece inside a message, one behind the other.
std::vector<TensorView> message_fields(char*& cursor, const std::vector<Field>& fields, std::int64_t batch, const Piece& piece) {
  std::vector<TensorView> views;
  for (const Field& field : fields) {
    views.emplace_back(cursor, field.dtype, field_shape(field, batch, piece.rows, piece.heads.count()));
    cursor += views.back().bytes();
  }
  return views;
}

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
      made.fields.emplace_back(cursor, field.dtype, field_shape(field, batch, rows, heads));
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

std::vector<ValueData> Runner::run(const std::vector<std::vector<TensorView>>& inputs, int layer) {
  layer_ = layer;
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

// Packs what goes to each peer into one message; a whole block in one piece of memory is sent and received in place.
void Runner::start_move(std::size_t index) {
  const Step& step = plan_.steps[index];
  const RankStep& mine = mine_.steps[index];
  Transfer& transfer = transfers_[index];
  const auto fields = fields_of(what(step.out[0]), plan_.problem->shape);
  const std::int64_t batch = plan_.problem->shape.batch;
  const bool sums = step.verb == Verb::kReduceScatter || step.verb == Verb::kHeadToSeq;
  data(step.out[0]) = allocate(step.out[0], sums);
  const ValueData& from = data(step.in[0]);
  ValueData& to = data(step.out[0]);
  const int own = mesh_.coordinate(step.axis);

  std::vector<SendPart> sends;
  const auto message_size = [&](std::span<const Piece> pieces) {
    std::int64_t bytes = 0;
    for (const Piece& piece : pieces) {
      for (const Field& field : fields) bytes += field_shape(field, batch, piece.rows, piece.heads.count()).elements() * size_of(field.dtype);
    }
    return bytes;
  };
  const auto by_peer = [](const std::vector<Piece>& pieces, auto&& visit) {
    for (std::size_t begin = 0; begin < pieces.size();) {
      std::size_t end = begin;
      while (end < pieces.size() && pieces[end].peer == pieces[begin].peer) ++end;
      visit(std::span(pieces).subspan(begin, end - begin));
      begin = end;
    }
  };
  by_peer(mine.sends, [&](std::span<const Piece> pieces) {
    if (pieces[0].peer == own) return;
    const auto bytes = static_cast<std::size_t>(message_size(pieces));
    if (from.packed.defined() && pieces.size() == 1 && covers(pieces[0], block(step.in[0]), what(step.in[0]))) {
      sends.push_back({pieces[0].peer, from.packed->data, bytes});
      return;
    }
    transfer.buffers.push_back(Tensor::uninitialized(DType::kBF16, {static_cast<std::int64_t>(bytes / 2)}));
    char* cursor = transfer.buffers.back().ptr<char>();
    const Interval heads = block(step.in[0]).heads_for(what(step.in[0]));
    for (const Piece& piece : pieces) {
      const auto slots = message_fields(cursor, fields, batch, piece);
      for (std::size_t f = 0; f < fields.size(); ++f) {
        copy(part_of(from.fields[f], fields[f].statistic, piece.row, piece.rows, piece.heads.begin - heads.begin, piece.heads.count()), slots[f]);
      }
    }
    sends.push_back({pieces[0].peer, transfer.buffers.back()->data, bytes});
  });
  by_peer(mine.receives, [&](std::span<const Piece> pieces) {
    if (pieces[0].peer == own) return;
    const auto bytes = static_cast<std::size_t>(message_size(pieces));
    void* into = to.packed.defined() && step.verb == Verb::kRotate ? to.packed->data : nullptr;
    if (into == nullptr) {
      transfer.buffers.push_back(Tensor::uninitialized(DType::kBF16, {static_cast<std::int64_t>(bytes / 2)}));
      into = transfer.buffers.back()->data;
    }
    transfer.receives.push_back({pieces[0].peer, into, bytes});
  });
  transfer.ticket = mesh_.axis(step.axis).start(sends, transfer.receives, {name_of(step.verb), layer_, static_cast<int>(index)});
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
  const auto fields = fields_of(what(step.out[0]), plan_.problem->shape);
  const std::int64_t batch = plan_.problem->shape.batch;
  const bool sums = step.verb == Verb::kReduceScatter || step.verb == Verb::kHeadToSeq;
  const ValueData& from = data(step.in[0]);
  ValueData& to = data(step.out[0]);
  const Interval to_heads = block(step.out[0]).heads_for(what(step.out[0])), from_heads = block(step.in[0]).heads_for(what(step.in[0]));
  const auto put = [&](const TensorView& piece, std::size_t f, const Piece& place) {
    const TensorView target = part_of(to.fields[f], fields[f].statistic, place.row, place.rows, place.heads.begin - to_heads.begin, place.heads.count());
    sums ? add(piece, target) : copy(piece, target);
  };
  const int own = mesh_.coordinate(step.axis);
  std::size_t next_own = 0;
  const std::vector<Piece>& sends = mine_.steps[index].sends;
  char* cursor = nullptr;
  int peer = -1;
  for (const Piece& piece : mine_.steps[index].receives) {
    if (piece.peer == own) {
      while (sends[next_own].peer != own) ++next_own;
      const Piece& source = sends[next_own++];
      for (std::size_t f = 0; f < fields.size(); ++f) {
        put(part_of(from.fields[f], fields[f].statistic, source.row, source.rows, source.heads.begin - from_heads.begin, source.heads.count()), f, piece);
      }
      continue;
    }
    if (piece.peer != peer) {
      peer = piece.peer;
      const auto part = std::find_if(transfer.receives.begin(), transfer.receives.end(), [&](const RecvPart& r) { return r.peer == peer; });
      cursor = static_cast<char*>(part->data);
    }
    if (to.packed.defined() && step.verb == Verb::kRotate) continue;  // arrived in place
    const auto slots = message_fields(cursor, fields, batch, piece);
    for (std::size_t f = 0; f < fields.size(); ++f) put(slots[f], f, piece);
  }
  transfer.buffers.clear();
  transfer.state = Transfer::State::kDone;
  release_if_used(step.in[0]);
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
  const bool merge = step.in.size() > 2;
  ValueData state = merge ? take(step.in[2]) : allocate(step.out[0], false);
  if (!merge || !mine.tiles.empty()) {
    const ValueData &q = data(step.in[0]), &kv = data(step.in[1]);
    AttendArgs args{q.fields[0], kv.fields[0], kv.fields[1], mine.heads, mine.tiles, plan_.problem->scale, state.fields[1], state.fields[0], merge};
    if (!args.out.empty() || !args.lse.empty()) kernel_.attend(args);
  }
  data(step.out[0]) = std::move(state);
}

void Runner::attend_grad(const Step& step, const RankStep& mine) {
  const auto accumulator = [&](std::size_t input, std::size_t output) {
    return step.in[input] != kNoValue ? take(step.in[input]) : allocate(step.out[output], true);
  };
  ValueData dq = accumulator(3, 0), dkv = accumulator(4, 1);
  if (!mine.tiles.empty()) {
    const ValueData &q = data(step.in[0]), &kv = data(step.in[1]), &dout = data(step.in[2]);
    kernel_.attend_grad({q.fields[0], kv.fields[0], kv.fields[1], mine.heads, mine.tiles, plan_.problem->scale, dout.fields[2],
                         dout.fields[0], dout.fields[1], dq.fields[0], dkv.fields[0], dkv.fields[1]});
  }
  data(step.out[0]) = std::move(dq);
  data(step.out[1]) = std::move(dkv);
}

void Runner::finish_state(const Step& step) {
  ValueData state = take(step.in[0]);
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
  for (std::size_t f = 0; f < sum.fields.size(); ++f) add(other.fields[f], sum.fields[f]);
  data(step.out[0]) = std::move(sum);
}

}  // namespace dattn
