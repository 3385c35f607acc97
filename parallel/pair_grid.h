// A coarse picture of a mask: how many pairs are visible in each cell of the plane of queries and keys, from which follows
// about how many any blocks of queries and keys share, whatever their runs.
#pragma once

#include <utility>
#include <vector>

#include "parallel/plan.h"

namespace dattn {

class PairGrid {
 public:
  using Share = std::vector<std::pair<int, double>>;  // of a block's rows: cells that hold some, with the share of the cell's

  explicit PairGrid(const Problem& problem);
  int cells(bool key_side) const { return cells_[key_side ? 1 : 0]; }
  Share share(const Positions& rows, bool key_side) const;
  std::vector<double> seen(const Share& queries) const;  // pairs of these queries by cells of keys
  static double pairs(const std::vector<double>& seen, const Share& keys);

 private:
  std::int64_t length_[2] = {};  // queries, keys
  int cells_[2] = {};
  std::vector<double> pairs_;  // [cells of queries, cells of keys]
};

}  // namespace dattn
