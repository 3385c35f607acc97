// Losses added up over a job (see loss_sum.h).
#include "plugins/train/loss_sum.h"

#include "core/nn/row_tree.h"

namespace dattn {

LossSum::LossSum(const Mesh& mesh, bool by_row, std::int64_t rows)
    : by_row_(by_row),
      contributes_(mesh.coordinate(Axis::kTensor) == 0),  // losses are equal over tensor
      parts_(static_cast<std::size_t>(mesh.sequence().size())),
      part_(static_cast<std::size_t>(mesh.sequence_index())),
      places_(by_row ? static_cast<std::size_t>(rows) * parts_ : 1) {}

void LossSum::add(Interval rows, double loss) {
  if (contributes_) places_[by_row_ ? static_cast<std::size_t>(rows.begin) * parts_ + part_ : 0] += loss;
}

double LossSum::total() const {
  if (!by_row_) return places_[0];
  double sum = 0;
  for (std::size_t row = 0; row < places_.size(); row += parts_) sum += tree_sum(std::span(places_).subspan(row, parts_));
  return sum;
}

}  // namespace dattn
