// What training holds on a rank's device, predicted from the config alone: `dattn plan` says it before anything is started.
// Tensors are counted as trainer, transformer and runner make them, with the sums of the largest moments; not counted are what
// kernels and libraries keep for themselves (workspace, NCCL's buffers, CUDA's context: about a gigabyte together).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/nn/model_config.h"
#include "parallel/attention.h"
#include "parallel/mesh.h"
#include "plugins/train/train_config.h"

namespace dattn {

// Of the greatest rank: bytes that its runner holds in one layer's attention (RankCost::peak_memory), inputs and results
// included.
struct AttentionPeaks {
  std::int64_t forward = 0;
  std::int64_t backward = 0;
};

// Bytes of the rank that holds most.
struct TrainingMemory {
  std::int64_t parameters = 0;  // elements held, not bytes
  std::int64_t weights = 0;     // fp32, and a copy of those of linear layers in the compute type where that is another
  std::int64_t gradients = 0;   // fp32
  std::int64_t optimizer = 0;   // AdamW's two moments, fp32, of the rank's share
  std::int64_t kept = 0;        // what the blocks keep for backward: with recomputation their inputs
  std::int64_t working = 0;     // beside that at the greatest moment: one block, the attention, or the loss

  std::int64_t total() const { return weights + gradients + optimizer + kept + working; }
};

TrainingMemory training_memory(const ModelConfig& model, const TrainConfig& train, const MeshShape& mesh, DType dtype,
                               Determinism determinism, const AttentionPeaks& attention);

// "training holds 42.1 GB on a rank: weights 6.7, ..", for people; and the options that lower it.
std::string text_of(const TrainingMemory& memory, Recompute recompute);
std::string_view memory_remedies();

// Batch rows that a rank computes at a time: its share of the batch over the pieces of train.accumulate.
std::int64_t rows_at_a_time(const TrainConfig& train, int data_ranks);

}  // namespace dattn
