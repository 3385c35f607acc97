#include "core/nn/on_cuda.h"

#include <map>

namespace dattn {
namespace {

// A view of host memory that is only read.
template <class T>
TensorView view_of(std::span<const T> values, DType dtype) {
  return {const_cast<T*>(values.data()), dtype, {static_cast<std::int64_t>(values.size())}};
}

}  // namespace

Tensor to_device(std::span<const std::int32_t> values) { return to_device(view_of(values, DType::kI32), current_device()); }
Tensor to_device(std::span<const std::int64_t> values) { return to_device(view_of(values, DType::kF64), current_device()); }

RowGroups::RowGroups(std::span<const std::int32_t> targets) {
  std::map<std::int32_t, std::vector<std::int32_t>> by_target;
  for (std::size_t row = 0; row < targets.size(); ++row) {
    if (targets[row] >= 0) by_target[targets[row]].push_back(static_cast<std::int32_t>(row));
  }
  std::vector<std::int32_t> target, begin{0}, rows;
  for (const auto& [row, sources] : by_target) {
    target.push_back(row);
    rows.insert(rows.end(), sources.begin(), sources.end());
    begin.push_back(static_cast<std::int32_t>(rows.size()));
  }
  groups_ = static_cast<std::int64_t>(target.size());
  target_ = to_device(target);
  begin_ = to_device(begin);
  rows_ = to_device(rows);
}

CudaRowGroups RowGroups::view() const {
  return {groups_, target_.ptr<std::int32_t>(), begin_.ptr<std::int32_t>(), rows_.ptr<std::int32_t>()};
}

}  // namespace dattn
