// A model spread over a mesh, with what one optimizer step of it needs: the training loop's inside, which knows of no text, run
// folder or schedule.
//
//   step.forward_backward(n, window)   share of this rank -> forward, backward (accumulate times) -> gradients summed
//   step.update(rate, sums)            clip by the global norm, AdamW on this rank's share, new values from the others
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "core/nn/optimizer.h"
#include "core/nn/transformer.h"
#include "parallel/comm/decorators.h"
#include "parallel/data_parallel.h"
#include "parallel/mesh.h"
#include "parallel/sequence_parallel.h"
#include "parallel/tensor_parallel.h"
#include "plugins/train/batch_share.h"
#include "plugins/train/loss_scale.h"
#include "plugins/train/loss_sum.h"
#include "plugins/train/train_job.h"

namespace dattn {

// Refuses what no model would make good, on all ranks alike and before any work. Throws Error(kBadInput).
void require_trainable(const TrainJob& job);

// Equal on every rank.
struct StepSums {
  double loss = 0;                // nats per symbol
  double grad_norm = 0;           // taken back to size
  std::int64_t bytes = 0;         // sent by all ranks so far
  std::int64_t update_bytes = 0;  // and by an update, if it is taken
};

// What became of an update. Not taken: fp16's gradients overflowed, for which the loss scale fell and later steps go on; or the
// loss or the gradients are not finite and no smaller scale would help.
enum class Update { kTaken, kOverflowed, kDiverged };

class TrainStep {
 public:
  using Gradients = std::function<void(std::span<Parameter* const>)>;

  // `world` counts its bytes in `counter`; the mesh is made of it. `model` is resolved. No communication; throws
  // Error(kBadInput), on all ranks alike, for what the mesh cannot share out and for sequences longer than the model has
  // positions. All arguments must outlive the step.
  TrainStep(Communicator& world, const ByteCounter& counter, const Mesh& mesh, const TrainJob& job, const ModelConfig& model);

  // The gradients of step `step` (from 0), summed over the mesh where this rank updates them, and its sums; row r of its batch
  // is window(r), of train.seq_len + 1 symbols. `before_sum`, if any, is called with this rank's own gradients. Collective.
  StepSums forward_backward(std::int64_t step, const BatchShare::Window& window, const Gradients& before_sum = {});
  // AdamW with those gradients, clipped to train.clip_norm. Only a taken update changes weights; the same on every rank.
  // Collective.
  Update update(double rate, const StepSums& sums);
  // The mean loss (nats per symbol) of `rows` windows, without gradients; in as much memory as a step's. Collective.
  double loss(std::int64_t rows, const BatchShare::Window& window);

  Transformer& transformer() { return transformer_; }
  AdamW& optimizer() { return optimizer_; }
  const ParameterShares& shares() const { return gradients_->shares(); }  // of which the optimizer has this rank's
  LossScale& loss_scale() { return loss_scale_; }

 private:
  // Into how many pieces this rank's rows of a batch are cut, if not by its invariance.
  std::int64_t pieces_of(std::int64_t rows, std::int64_t pieces) const;
  // Sums a loss and other numbers over the world, each contributed once, in one exchange.
  std::array<double, 3> sum_over_world(LossSum& loss, const std::array<double, 3>& others);

  Communicator& world_;
  const ByteCounter& counter_;
  const Mesh& mesh_;
  const TrainJob& job_;
  BatchShare share_;
  std::unique_ptr<Boundary> boundary_;
  TensorVocabularyReduction vocabulary_;
  DistributedAttention attention_;
  Transformer transformer_;
  std::unique_ptr<GradientSync> gradients_;
  AdamW optimizer_;
  LossScale loss_scale_;
};

}  // namespace dattn
