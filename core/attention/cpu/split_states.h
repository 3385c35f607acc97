// States of query rows over ranges of keys that are worked on apart ("split KV", Dao et al., Flash-Decoding, 2023): not
// normalised, and merged in ascending order of the ranges, so that no bit depends on the threads.
#pragma once

#include "core/attention/cpu/ops.h"
#include "core/attention/kernel.h"

namespace dattn::cpu {

class SplitStates {
 public:
  // The rows [B, S, H] of `args` over `splits` ranges; `width`: V padded.
  SplitStates(const AttendArgs& args, std::int64_t splits, std::int64_t width);

  // Those of one head over one range, from `row` on.
  RowStates at(std::int64_t b, std::int64_t h, std::int64_t split, std::int64_t row) const;

  // Writes the rows' results, or merges them into what `args` holds already.
  void finish(const AttendArgs& args) const;

 private:
  void finish_row(const AttendArgs& args, std::int64_t b, std::int64_t h, std::int64_t row) const;

  std::int64_t splits_, rows_, heads_, width_;
  Tensor out_, top_, sum_;  // [B, H, splits, rows] (x width)
};

}  // namespace dattn::cpu
