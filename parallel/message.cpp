#include "parallel/message.h"

namespace dattn {
namespace {

// Part of a field: the rows and heads of a piece.
TensorView part_of(const FieldSet& set, std::size_t field, const Piece& piece) {
  const std::int64_t head = piece.heads.begin - set.first_head, heads = piece.heads.count();
  const TensorView& view = set.views[field];
  return set.fields[field].statistic ? view.slice(1, head, heads).slice(2, piece.row, piece.rows)
                                     : view.slice(1, piece.row, piece.rows).slice(2, head, heads);
}

// Calls visit(field, piece, view of its place in the message) in the message's order.
template <class Visit>
void for_each_slot(std::span<const Field> fields, std::int64_t batch, std::span<const Piece> pieces, void* message,
                   const Visit& visit) {
  char* cursor = static_cast<char*>(message);
  for (const Piece& piece : pieces) {
    for (std::size_t f = 0; f < fields.size(); ++f) {
      const TensorView slot(cursor, fields[f].dtype, field_shape(fields[f], batch, piece.rows, piece.heads.count()));
      visit(f, piece, slot);
      cursor += slot.bytes();
    }
  }
}

void put(const TensorView& from, const TensorView& to, bool sum) { sum ? add(from, to) : copy(from, to); }

}  // namespace

Shape field_shape(const Field& field, std::int64_t batch, std::int64_t rows, std::int64_t heads) {
  return field.statistic ? Shape{batch, heads, rows} : Shape{batch, rows, heads, field.width};
}

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
  for (const Piece& piece : pieces) {
    for (const Field& field : fields)
      bytes += field_shape(field, batch, piece.rows, piece.heads.count()).elements() * size_of(field.dtype);
  }
  return bytes;
}

void pack(const FieldSet& from, std::span<const Piece> pieces, void* message) {
  for_each_slot(from.fields, from.batch, pieces, message,
                [&](std::size_t f, const Piece& piece, const TensorView& slot) { copy(part_of(from, f, piece), slot); });
}

void unpack(const void* message, std::span<const Piece> pieces, const FieldSet& to, bool sum) {
  for_each_slot(to.fields, to.batch, pieces, const_cast<void*>(message),
                [&](std::size_t f, const Piece& piece, const TensorView& slot) { put(slot, part_of(to, f, piece), sum); });
}

void move_within(const FieldSet& from, std::span<const Piece> sent, const FieldSet& to, std::span<const Piece> received,
                 bool sum) {
  for (std::size_t i = 0; i < received.size(); ++i) {
    for (std::size_t f = 0; f < to.fields.size(); ++f) put(part_of(from, f, sent[i]), part_of(to, f, received[i]), sum);
  }
}

}  // namespace dattn
