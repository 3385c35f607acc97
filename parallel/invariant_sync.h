// Gradient sums with the same bits on every mesh of data and sequence ranks, however many rows are computed at a time.
//
//   one row of the batch   the tree of core/nn/row_tree.h over its leaves: within a rank (core/nn), then over the ranks that
//                          share the row, neighbours first
//   rows of a group        in ascending order
//   groups                 a balanced binary tree; a step's rows are cut into 8 groups of equal size, or 4, 2, 1 where the
//                          batch is no multiple. Each data rank holds a whole subtree.
//
//   batch 16, data 2, ring 2      data 0: rows 0 1 | 2 3 | 4 5 | 6 7      data 1: rows 8 9 | .. | 14 15
//                                 each row:  ring 0 + ring 1
//
// A row must be whole before rows are added, so where the sequence is sharded, gradients travel once for each row that a rank
// computes and not once a step: 2 n (P-1)/P bytes a row and rank, for n bytes of gradients and P sequence ranks.
#pragma once

#include <vector>

#include "parallel/data_parallel.h"

namespace dattn {

// Groups that the rows of a batch are summed in: the largest power of two that divides it, at most kMostGroups.
inline constexpr int kMostGroups = 8;
int row_groups(std::int64_t batch);

// Sums data over the group in place: ranks 0 and 1, 2 and 3, .., then pairs of these, and so on. The ranks are a power of
// two, data is contiguous fp32. Reduce-scatter by halving, all-gather by doubling (Thakur, Rabenseifner and Gropp, 2005):
// 2 n (P-1)/P bytes received by a rank.
void all_reduce_tree(Communicator& group, const TensorView& data, const OpLabel& label);

class InvariantGradientSync final : public GradientSync {
 public:
  // batch: rows of a step on all ranks together. Each piece is one row, in ascending order; a rank computes equally many,
  // whole groups. No tensor ranks; sequence ranks and data ranks are powers of two (see plugins/train/invariant.h).
  InvariantGradientSync(const Mesh& mesh, std::span<Parameter* const> parameters, std::int64_t batch,
                        std::int64_t bucket_bytes = kBucketBytes);

  // Takes the row's gradients, which it leaves zero. Verb "gradient".
  void piece_done() override;
  // Leaves the step's gradients, whole, on every rank. Verb "gradient".
  void sum() override;

 private:
  using Gradients = std::vector<Tensor>;  // one for each parameter
  void finish_row();
  void close_group();

  std::int64_t rows_per_group_;
  std::int64_t rows_done_ = 0;     // of the open group
  std::int64_t groups_done_ = 0;   // of this step
  Gradients open_;                 // sum of the open group's rows
  std::vector<Gradients> closed_;  // subtrees of groups, the largest first
};

}  // namespace dattn
