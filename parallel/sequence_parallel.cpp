// Sequence parallelism (see sequence_parallel.h).
#include "parallel/sequence_parallel.h"

#include "core/attention/positions.h"
#include "core/base/error.h"

namespace dattn {

std::int64_t SequenceBoundary::residual_rows(std::int64_t rows) const {
  return split_evenly(rows, tensor_.size(), tensor_.rank()).count();
}

std::int64_t SequenceBoundary::residual_begin(std::int64_t rows) const {
  return split_evenly(rows, tensor_.size(), tensor_.rank()).begin;
}

std::vector<std::int64_t> SequenceBoundary::counts(std::int64_t rows, std::int64_t width) const {
  std::vector<std::int64_t> result;
  for (int part = 0; part < tensor_.size(); ++part) result.push_back(split_evenly(rows, tensor_.size(), part).count() * width);
  return result;
}

Tensor SequenceBoundary::gather(const TensorView& own, std::int64_t rows) {
  ensure(own.axes() == 2 && own.size(0) == residual_rows(rows), "sequence gather of {} where {} of {} rows are expected",
         own.shape.text(), residual_rows(rows), rows);
  const std::int64_t width = own.size(1);
  Tensor all = Tensor::uninitialized(own.dtype, {rows, width});
  copy(own, all->slice(0, residual_begin(rows), own.size(0)));
  tensor_.all_gather(all, counts(rows, width), {.verb = "sequence_gather"});
  return all;
}

Tensor SequenceBoundary::scatter(const TensorView& all, std::int64_t rows) {
  ensure(all.axes() == 2 && all.size(0) == rows, "sequence scatter of {} where {} rows are expected", all.shape.text(), rows);
  Tensor own = Tensor::uninitialized(all.dtype, {residual_rows(rows), all.size(1)});
  tensor_.reduce_scatter_sum(all, counts(rows, all.size(1)), own, {.verb = "sequence_scatter"});
  return own;
}

}  // namespace dattn
