// Tensor parallelism: heads, hidden units and vocabulary are cut over the tensor axis; every rank of the axis keeps the
// whole residual stream. Column-parallel products come first in a block and row-parallel ones last, so one sum closes
// each block. Source: Shoeybi et al., "Megatron-LM", 2019 (enter and leave are its f and g).
//
//   forward    x ----> enter: as it is ----> [column cut, row cut] ----> leave: sum over the axis ----> x
//   backward   dx <--- sum over the axis <-- [       ..         ] <----- as it is <-------------------- dx
#pragma once

#include "core/nn/hooks.h"
#include "parallel/comm/communicator.h"

namespace dattn {

// Bytes are counted under "tensor_sum". The communicator must outlive the boundary.
class TensorBoundary final : public Boundary {
 public:
  explicit TensorBoundary(Communicator& tensor) : tensor_(tensor) {}

  Tensor enter_backward(Tensor dy, std::int64_t rows) override;
  Tensor leave(Tensor x, std::int64_t rows) override;

 private:
  Communicator& tensor_;
};

// Sums and maxima over the parts of the vocabulary, for the vocabulary-parallel cross-entropy. Verbs "vocabulary_sum"
// and "vocabulary_max".
class TensorVocabularyReduction final : public VocabularyReduction {
 public:
  explicit TensorVocabularyReduction(Communicator& tensor) : tensor_(tensor) {}

  void sum(const TensorView& data) override;
  void maximum(const TensorView& data) override;

 private:
  Communicator& tensor_;
};

}  // namespace dattn
