// Tensor parallelism (see tensor_parallel.h).
#include "parallel/tensor_parallel.h"

namespace dattn {

Tensor TensorBoundary::enter_backward(Tensor dy, std::int64_t) {
  tensor_.all_reduce_sum(dy, {.verb = "tensor_sum"});
  return dy;
}

Tensor TensorBoundary::leave(Tensor x, std::int64_t) {
  tensor_.all_reduce_sum(x, {.verb = "tensor_sum"});
  return x;
}

void TensorVocabularyReduction::sum(const TensorView& data) { tensor_.all_reduce_sum(data, {.verb = "vocabulary_sum"}); }

void TensorVocabularyReduction::maximum(const TensorView& data) { tensor_.all_reduce_max(data, {.verb = "vocabulary_max"}); }

}  // namespace dattn
