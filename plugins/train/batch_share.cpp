// A rank's part of a batch (see batch_share.h).
#include "plugins/train/batch_share.h"

namespace dattn {

BatchShare::BatchShare(const Mesh& mesh, const Positions& positions, std::int64_t seq_len)
    : data_parts_(mesh.shape().size(Axis::kData)),
      data_index_(mesh.coordinate(Axis::kData)),
      seq_len_(seq_len),
      positions_(positions.list()) {}

Interval BatchShare::rows(std::int64_t batch) const { return split_evenly(batch, data_parts_, data_index_); }

TokenBatch BatchShare::tokens(Interval rows, const Window& window) {
  tokens_.clear();
  targets_.clear();
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const std::vector<std::int32_t> symbols = window(row);
    for (const std::int64_t position : positions_) {
      tokens_.push_back(symbols[static_cast<std::size_t>(position)]);
      targets_.push_back(symbols[static_cast<std::size_t>(position) + 1]);
    }
  }
  TokenBatch batch;
  batch.batch = rows.count();
  batch.tokens = tokens_;
  batch.targets = targets_;
  batch.positions = positions_;
  batch.batch_begin = rows.begin;
  return batch;
}

void BatchShare::for_each_piece(std::int64_t batch, std::int64_t parts, const std::function<void(Interval)>& body) const {
  const Interval own = rows(batch);
  for (std::int64_t part = 0; part < parts; ++part) {
    const Interval piece = split_evenly(own.count(), parts, part);
    if (piece.count() > 0) body({own.begin + piece.begin, own.begin + piece.end});
  }
}

}  // namespace dattn
