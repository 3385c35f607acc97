// A row of a key/value cache.
#pragma once

#include "core/tensor/tensor.h"

namespace dattn {

// Row `at` of cache [1, capacity, K, D] = row [1, 1, K, D], of one type. In a step that is a graph `at` travels as a
// number in memory, so that the work is the same for every row (core/device/step_graph.h).
void store_row(const TensorView& row, std::int64_t at, const TensorView& cache);

}  // namespace dattn
