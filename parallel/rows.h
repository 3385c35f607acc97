// Rows of a shard inside the whole tensor that it was cut from.
#pragma once

#include "core/attention/positions.h"
#include "core/tensor/tensor.h"

namespace dattn {

// Calls body(rows of the whole, rows of the shard) for every run of the shard's positions; both are views, that of the whole
// strided as the run is. axis: that of the sequence in both.
template <class Body>
void for_each_run(const Positions& rows, int axis, const TensorView& whole, const TensorView& shard, const Body& body) {
  for (std::size_t i = 0; i < rows.runs().size(); ++i) {
    const Run& run = rows.runs()[i];
    body(whole.slice(axis, run.begin, run.count, run.step), shard.slice(axis, rows.row_of_run(i), run.count));
  }
}

}  // namespace dattn
