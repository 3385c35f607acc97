// The order of sums over token rows when results must have the same bits wherever the rows are: a balanced binary tree
// over leaves of fixed rows. A batch row's sequence is cut into 16 leaves. Leaves 0 and 15, 1 and 14, .. are neighbours in
// the tree, because zigzag gives a rank leaves from the front and as many, mirrored, from the back: of 1, 2, 4 or 8 ranks
// each holds one whole subtree, and the ranks' sums are the tree's next levels (parallel/invariant_sync.h).
//
//   leaves   0  15   1  14   2  13   3  12   4  11   5  10   6   9   7   8
//             \ /     \ /     \ /     \ /     \ /     \ /     \ /     \ /
//              '---+---'       '---+---'       '---+---'       '---+---'
//   8 ranks:   0       1       2       3       4       5       6       7        2 ranks:  0 0 0 0 1 1 1 1
//
// Within a leaf, whatever sums over rows or multiplies them is called with the leaf alone, in one fixed shape and on one
// thread, or one call of the device: a matrix library chooses the order of its sums by shape and number of threads.
#pragma once

#include <span>
#include <vector>

#include "core/attention/positions.h"
#include "core/tensor/tensor.h"

namespace dattn {

inline constexpr int kLeaves = 16;  // of a whole sequence

struct RowTree {
  std::vector<Interval> leaves;  // rows of each, in the order of the tree; a power of two, or none: any fixed order will do

  bool empty() const { return leaves.empty(); }
};

// The rows of one sequence of which `leaves` (even) leaves of equal length are here: the first half from the front of the
// sequence, the second half mirrored from its back.
RowTree folded_rows(std::int64_t rows, int leaves);

// to += from: contiguous fp32 of equal shape, on all threads or on their device.
void add_contiguous(const TensorView& from, const TensorView& to);

// to = the sum of nodes [begin, end) of a tree, a power of two of them. leaf(i, view, add) writes what leaf i adds to the
// sum, or, with `add`, adds it. Takes as many tensors of the shape of `to` as the tree has levels, less one.
template <class Leaf>
void tree_sum(std::size_t begin, std::size_t end, const TensorView& to, const Leaf& leaf) {
  if (end - begin <= 2) {
    for (std::size_t i = begin; i < end; ++i) leaf(i, to, i > begin);
    return;
  }
  const std::size_t middle = begin + (end - begin) / 2;
  tree_sum(begin, middle, to, leaf);
  const Tensor right = Tensor::uninitialized(to.dtype, to.shape);
  tree_sum(middle, end, right, leaf);
  add_contiguous(right, to);
}

// The same for one number a leaf.
double tree_sum(std::span<const double> leaves);

}  // namespace dattn
