// The loss of a step or an evaluation, added up over the pieces and ranks that computed it. Plainly: one sum in the order of
// pieces and ranks. By row: each row's loss has a place for each sequence rank; those are added as the tree of
// core/nn/row_tree.h says, then the rows in ascending order, so that the sum has the same bits on every mesh.
#pragma once

#include <span>
#include <vector>

#include "core/attention/positions.h"
#include "parallel/mesh.h"

namespace dattn {

class LossSum {
 public:
  LossSum(const Mesh& mesh, bool by_row, std::int64_t rows);

  // Adds this rank's loss of a piece; by row, a piece is one row.
  void add(Interval rows, double loss);
  // This rank's places, to be summed over the world, in which each is filled once.
  std::span<double> places() { return places_; }
  // Of the summed places.
  double total() const;

 private:
  bool by_row_, contributes_;
  std::size_t parts_, part_;
  std::vector<double> places_;  // by row: [rows, parts]
};

}  // namespace dattn
