// What an invariant training run refuses (see invariant.h).
#include "plugins/train/invariant.h"

#include <algorithm>

#include "core/base/error.h"
#include "core/nn/row_tree.h"
#include "parallel/invariant_sync.h"

namespace dattn {
namespace {

// The largest power of two that is at most `count` and at most `most`.
int power_below(int count, int most) {
  int power = 1;
  while (2 * power <= std::min(count, most)) power *= 2;
  return power;
}

}  // namespace

void require_invariant(const TrainJob& job) {
  const int tensor = job.mesh.size(Axis::kTensor), sequence = job.mesh.sequence_parts(), data = job.mesh.size(Axis::kData);
  require(tensor == 1,
          "determinism invariant: mesh.tensor is {}, but the sums of matrix products cut over tensor ranks depend on their "
          "number; use mesh.tensor=1 and data or sequence ranks in its place, or determinism=repeatable",
          tensor);
  require(!job.train.sequence_parallel,
          "determinism invariant: train.sequence_parallel is for tensor ranks, which are refused with it; use "
          "train.sequence_parallel=false");
  require(job.layout == Layout::kZigzag,
          "determinism invariant: layout {} gives ranks positions whose sums are no part of the fixed tree; use layout=zigzag",
          name_of(job.layout));
  constexpr int kMostParts = kLeaves / 2;
  require(sequence == power_below(sequence, kMostParts),
          "determinism invariant: {} sequence ranks (mesh {}) do not divide the {} pairs of leaves that a sequence is summed "
          "in; use {} ranks on ring, rows and ulysses together",
          sequence, job.mesh.text(), kMostParts, power_below(sequence, kMostParts));
  const std::int64_t seq = job.train.seq_len;
  require(seq % kLeaves == 0,
          "determinism invariant: train.seq_len {} is no multiple of the {} leaves that it is summed in; use {}", seq, kLeaves,
          (seq / kLeaves + 1) * kLeaves);
  const int groups = row_groups(job.train.batch), nearest = power_below(data, groups);
  if (groups % data == 0) return;
  const bool other_batch = data == power_below(data, kMostGroups);
  fail(ErrorCode::kBadInput,
       "determinism invariant: train.batch {} is summed in {} groups of rows, which mesh.data {} does not divide; use "
       "mesh.data={}{}",
       job.train.batch, groups, data, nearest,
       other_batch ? fmt::format(" or train.batch={}", (job.train.batch + data - 1) / data * data) : "");
}

}  // namespace dattn
