// Messages: the pieces that a rank sends to one peer, one behind the other without a header. Both sides list the pieces
// they share in the same order, so the receiver knows what every byte is.
//
//   message = piece 0: field 0 [B, rows, heads, width], field 1, ..  | piece 1: field 0, ..
#pragma once

#include <span>
#include <vector>

#include "parallel/rank_plan.h"

namespace dattn {

// What happens to the rows that a piece arrives at: overwritten, added to, or, as states (lse, out), merged into.
enum class Arrival { kCopy, kSum, kMerge };

// The fields of one value, as a message carries them, on one side of a move, and the heads its block begins with.
struct FieldSet {
  std::span<const Field> fields;
  std::span<const TensorView> views;  // [B, rows, heads, width]; statistics [B, heads, rows]
  std::int64_t batch = 0;
  std::int64_t first_head = 0;
};

std::vector<std::span<const Piece>> by_peer(const std::vector<Piece>& pieces);  // pieces are sorted by peer

std::int64_t message_bytes(std::span<const Field> fields, std::int64_t batch, std::span<const Piece> pieces);
// message: contiguous, of message_bytes, on the device of the fields.
void pack(const FieldSet& from, std::span<const Piece> pieces, const TensorView& message);
void unpack(const TensorView& message, std::span<const Piece> pieces, const FieldSet& to, Arrival arrival);
// Pieces that stay on the rank: as many on both sides, in the same order.
void move_within(const FieldSet& from, std::span<const Piece> sent, const FieldSet& to, std::span<const Piece> received,
                 Arrival arrival);

}  // namespace dattn
