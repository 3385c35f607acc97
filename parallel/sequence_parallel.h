// Megatron-style sequence parallelism: between the parts that tensor parallelism cuts, the rows of the residual stream
// are cut over the tensor axis too, so norms, dropout and the saved activations are not held by every rank. A sum over
// the axis becomes a gather before the cut part and a reduce-scatter after it: the same bytes, less memory.
// Source: Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022.
//
//   forward    x rows ---> enter: gather ----------> [column cut, row cut] ---> leave: reduce-scatter ---> x rows
//   backward   dx rows <-- reduce-scatter <--------- [       ..         ] <---- gather <------------------ dx rows
#pragma once

#include <vector>

#include "core/nn/hooks.h"
#include "parallel/comm/communicator.h"

namespace dattn {

// N token rows are split evenly over the tensor axis; parts may be uneven or empty. Bytes are counted under
// "sequence_gather" and "sequence_scatter". The communicator must outlive the boundary.
class SequenceBoundary final : public Boundary {
 public:
  explicit SequenceBoundary(Communicator& tensor) : tensor_(tensor) {}

  std::int64_t residual_rows(std::int64_t rows) const override;
  std::int64_t residual_begin(std::int64_t rows) const override;
  Tensor enter(Tensor x, std::int64_t rows) override { return gather(x, rows); }
  Tensor enter_backward(Tensor dy, std::int64_t rows) override { return scatter(dy, rows); }
  Tensor leave(Tensor x, std::int64_t rows) override { return scatter(x, rows); }
  Tensor leave_backward(Tensor dy, std::int64_t rows) override { return gather(dy, rows); }

 private:
  Tensor gather(const TensorView& own, std::int64_t rows);   // [own rows, M] -> [N, M]
  Tensor scatter(const TensorView& all, std::int64_t rows);  // [N, M] -> [own rows, M], summed over the axis
  std::vector<std::int64_t> counts(std::int64_t rows, std::int64_t width) const;  // elements of each rank's rows

  Communicator& tensor_;
};

}  // namespace dattn
