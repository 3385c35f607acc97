// The training loop: the same losses on every mesh. Each step takes its batch from (seed, step) alone, cuts it over the
// mesh, sums gradients over the ranks that share parameters, clips by the global norm and steps AdamW; the loss is the mean
// over all target tokens of the step.
//
//   for every step:   window of the text -> share of this rank -> forward, backward (accumulate times)
//                     -> gradients summed -> (loss, norm) summed over the job, checked -> clip, AdamW -> report
#pragma once

#include <functional>
#include <span>

#include "core/nn/parameter.h"
#include "parallel/comm/communicator.h"
#include "plugins/train/report.h"
#include "plugins/train/train_job.h"

namespace dattn {

struct TrainHooks {
  Report::EventSink on_event = {};  // first rank only: one JSON object per call
  bool progress = true;             // the progress line and the closing lines, on stderr
  // Called on every rank with its gradients of a step (from 0) before they are summed.
  std::function<void(std::int64_t step, std::span<Parameter* const> parameters)> on_gradients = {};
};

// Collective over the world. Errors, the same on every rank: kBadInput (config, data, checkpoint of another model), kSystem
// (disk full), kDiverged (loss or gradient norm not finite: nothing of that step is kept; in fp16, gradients that are not
// finite only skip the step until the loss scale is 1), kPeer.
TrainResult train(Communicator& world, const TrainJob& job, const TrainHooks& hooks);

}  // namespace dattn
