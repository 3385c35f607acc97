// `determinism: invariant` of a training run: losses and weights have the same bits on every mesh of data and sequence ranks
// and for any number of threads, because all sums follow trees that no mesh changes (core/nn/row_tree.h,
// parallel/invariant_sync.h). What the trees have no room for is refused.
#pragma once

#include "plugins/train/train_job.h"

namespace dattn {

// Throws Error(kBadInput), on all ranks alike and before any work, for a job whose bits could depend on its mesh; the message
// names the nearest choice that is supported.
void require_invariant(const TrainJob& job);

}  // namespace dattn
