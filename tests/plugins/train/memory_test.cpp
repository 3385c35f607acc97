// The memory that training is predicted to hold, beside what it holds.
#include "plugins/train/memory.h"

#include <gtest/gtest.h>

#include "core/nn/transformer.h"
#include "parallel/rank_plan.h"
#include "parallel/strategy.h"
#include "plugins/train/text_data.h"
#include "tests/plugins/small_job.h"

namespace dattn {
namespace {

// Wide enough that tensors outweigh what kernels pack, and long enough that activations outweigh weights.
TrainJob wide_job(const TemporaryFolder& folder) {
  TrainJob job = small_job(folder);
  job.model.layers = 3;
  job.model.dim = 96;
  job.model.heads = 6;
  job.model.kv_heads = 3;
  job.model.head_dim = 16;
  job.model.hidden = 256;
  job.train.steps = 1;
  job.train.batch = 4;
  job.train.seq_len = 192;
  job.train.eval_batches = 1;
  return job;
}

AttentionPeaks peaks_of(const TrainJob& job, const ModelConfig& model) {
  const AttentionShape shape{rows_at_a_time(job.train, job.mesh.size(Axis::kData)),
                             job.train.seq_len,
                             job.train.seq_len,
                             model.heads,
                             model.kv_heads,
                             model.head_dim,
                             model.head_dim,
                             job.dtype};
  AttentionOptions options;
  options.strategy = job.strategy;
  options.layout = job.layout;
  const Plan forward = make_plan(job.mesh, shape, options), gradient = backward(forward);
  AttentionPeaks peaks;
  for (int rank = 0; rank < job.mesh.ranks(); ++rank) {
    peaks.forward = std::max(peaks.forward, make_rank_plan(forward, rank).cost.peak_memory);
    peaks.backward = std::max(peaks.backward, make_rank_plan(gradient, rank).cost.peak_memory);
  }
  return peaks;
}

// The most that any rank held.
std::int64_t measured(const TrainJob& job) {
  std::mutex mutex;
  std::int64_t most = 0;
  run_thread_ranks(job.mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(1);
    const TensorMeter meter;
    train(world, job, {.on_event = {}, .progress = false});
    const std::lock_guard lock(mutex);
    most = std::max(most, meter.peak());
  });
  return most;
}

void expect_predicted(const TrainJob& job, std::int64_t alphabet) {
  ModelConfig model = job.model;
  model.vocab = alphabet;
  const TrainingMemory memory = training_memory(model, job.train, job.mesh, job.dtype, job.determinism, peaks_of(job, model));
  const double ratio = static_cast<double>(memory.total()) / static_cast<double>(measured(job));
  EXPECT_GT(ratio, 0.9) << job.mesh.text() << ", recompute " << name_of(job.train.recompute) << ", " << name_of(job.dtype);
  EXPECT_LT(ratio, 1.12) << job.mesh.text() << ", recompute " << name_of(job.train.recompute) << ", " << name_of(job.dtype);
}

std::int64_t alphabet_of(const TrainJob& job) { return TextData::load(job.data.path, {}).alphabet().size(); }

TEST(TrainingMemory, IsWhatTrainingHolds) {
  const TemporaryFolder folder;
  for (const bool sequence_parallel : {false, true}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
      for (const auto& [tensor, ring, data] : {std::tuple{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {2, 2, 1}}) {
        TrainJob job = wide_job(folder);
        if (sequence_parallel && tensor == 1) continue;
        job.mesh = mesh_of(data, ring, 1, tensor);
        job.train.sequence_parallel = sequence_parallel;
        job.train.recompute = recompute;
        job.dtype = ring == 2 ? DType::kBF16 : DType::kF32;
        expect_predicted(job, alphabet_of(job));
      }
    }
  }
}

TEST(TrainingMemory, PiecesOfABatch) {
  const TemporaryFolder folder;
  TrainJob job = wide_job(folder);
  EXPECT_EQ(rows_at_a_time(job.train, 3), 2);
  job.train.accumulate = 4;
  EXPECT_EQ(rows_at_a_time(job.train, 1), 1);
  expect_predicted(job, alphabet_of(job));
}

TEST(TrainingMemory, CountsTheParametersOfEachPart) {
  ModelConfig model;
  for (const char* style : {"gpt2", "llama"}) {
    model = resolve(model_style(style));
    const TrainingMemory memory = training_memory(model, {}, MeshShape{}, DType::kF32, Determinism::kRepeatable, {});
    EXPECT_EQ(memory.parameters, count_parameters(model)) << style;
    EXPECT_EQ(memory.optimizer, 8 * memory.parameters);
  }
}

}  // namespace
}  // namespace dattn
