#include "parallel/message.h"

#include "core/attention/state.h"

namespace dattn {
namespace {

// Part of a field: the rows and heads of a piece.
TensorView part_of(const FieldSet& set, std::size_t field, const Piece& piece) {
  const bool one = set.fields[field].one_head && piece.heads.count() > 0;
  const std::int64_t head = one ? 0 : piece.heads.begin - set.first_head, heads = one ? 1 : piece.heads.count();
  const TensorView& view = set.views[field];
  return set.fields[field].statistic ? view.slice(1, head, heads).slice(2, piece.row, piece.rows, piece.step)
                                     : view.slice(1, piece.row, piece.rows, piece.step).slice(2, head, heads);
}

// Calls visit(piece, its fields' places in the message) in the message's order.
template <class Visit>
void for_each_slot(std::span<const Field> fields, std::int64_t batch, std::span<const Piece> pieces, const TensorView& message,
                   const Visit& visit) {
  char* cursor = message.ptr<char>();
  for (const Piece& piece : pieces) {
    std::vector<TensorView> slots;
    for (const Field& field : fields) {
      slots.emplace_back(cursor, field.dtype, field_shape(field, batch, piece.rows, piece.heads.count()), message.device);
      cursor += slots.back().bytes();
    }
    visit(piece, slots);
  }
}

// The fields of one piece, in order.
void put(std::span<const TensorView> from, std::span<const TensorView> to, Arrival arrival) {
  if (arrival == Arrival::kMerge) {
    const Tensor out = to_dtype(from[1], to[1].dtype);
    return merge_state(to[1], to[0], out, from[0]);
  }
  for (std::size_t f = 0; f < from.size(); ++f) arrival == Arrival::kSum ? add(from[f], to[f]) : copy(from[f], to[f]);
}

std::vector<TensorView> parts_of(const FieldSet& set, const Piece& piece) {
  std::vector<TensorView> parts;
  for (std::size_t f = 0; f < set.fields.size(); ++f) parts.push_back(part_of(set, f, piece));
  return parts;
}

}  // namespace

std::vector<std::span<const Piece>> by_peer(const std::vector<Piece>& pieces) {
  std::vector<std::span<const Piece>> groups;
  for (std::size_t begin = 0, end = 0; begin < pieces.size(); begin = end) {
    while (end < pieces.size() && pieces[end].peer == pieces[begin].peer) ++end;
    groups.push_back(std::span(pieces).subspan(begin, end - begin));
  }
  return groups;
}

std::int64_t message_bytes(std::span<const Field> fields, std::int64_t batch, std::span<const Piece> pieces) {
  std::int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece_bytes(fields, batch, piece);
  return bytes;
}

void pack(const FieldSet& from, std::span<const Piece> pieces, const TensorView& message) {
  for_each_slot(from.fields, from.batch, pieces, message, [&](const Piece& piece, const std::vector<TensorView>& slots) {
    put(parts_of(from, piece), slots, Arrival::kCopy);
  });
}

void unpack(const TensorView& message, std::span<const Piece> pieces, const FieldSet& to, Arrival arrival) {
  for_each_slot(to.fields, to.batch, pieces, message,
                [&](const Piece& piece, const std::vector<TensorView>& slots) { put(slots, parts_of(to, piece), arrival); });
}

void move_within(const FieldSet& from, std::span<const Piece> sent, const FieldSet& to, std::span<const Piece> received,
                 Arrival arrival) {
  for (std::size_t i = 0; i < received.size(); ++i) put(parts_of(from, sent[i]), parts_of(to, received[i]), arrival);
}

}  // namespace dattn
