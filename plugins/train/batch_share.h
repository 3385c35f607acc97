// Which part of a step's batch a rank computes: batch rows are cut over the data axis, positions over ring x ulysses by
// the layout; the ranks of the tensor axis compute the same tokens. Any counts work: parts may be uneven or empty.
//
//   batch 3 x seq 8, data 2, ring 2, zigzag      rank (data 0, ring 0)   rows 0 1   positions 0 1 6 7
//                                                rank (data 1, ring 1)   row  2     positions 2 3 4 5
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/attention/positions.h"
#include "core/nn/hooks.h"
#include "parallel/mesh.h"

namespace dattn {

class BatchShare {
 public:
  // The whole window [seq_len + 1 symbols] of a batch row: tokens are the first seq_len, targets the last.
  using Window = std::function<std::vector<std::int32_t>(std::int64_t row)>;

  BatchShare(const Mesh& mesh, const Positions& positions, std::int64_t seq_len);  // positions: of this rank

  std::int64_t seq_len() const { return seq_len_; }
  Interval rows(std::int64_t batch) const;  // this rank's rows of a batch

  // This rank's positions of the rows [begin, end), taken from `window`. The views of the result live until the next call.
  TokenBatch tokens(Interval rows, const Window& window);

  // Calls body(rows) for this rank's rows of a batch, cut into `parts` pieces; empty pieces are left out. Ranks that
  // exchange inside body (ring, ulysses, tensor) get the same pieces.
  void for_each_piece(std::int64_t batch, std::int64_t parts, const std::function<void(Interval rows)>& body) const;

 private:
  int data_parts_, data_index_;
  std::int64_t seq_len_;
  std::vector<std::int64_t> positions_;
  std::vector<std::int32_t> tokens_, targets_;
};

}  // namespace dattn
