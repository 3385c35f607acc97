// Training with determinism invariant: losses, evaluation and weights have the same bits on every mesh of data
// and sequence ranks, for any number of threads and of rows at a time; what could break that is refused.
#include "plugins/train/invariant.h"

#include <filesystem>
#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "parallel/comm/staged.h"
#include "plugins/train/checkpoint.h"
#include "tests/core/device/on_cuda.h"
#include "tests/plugins/small_job.h"

namespace dattn {
namespace {

// Llama style: rope, swiglu, grouped heads. GPT-2 style: learned positions, biases, gelu, a tied table; here with dropout and
// with recomputation. Lengths of leaves and features are no multiples of vectors.
TrainJob invariant_job(const TemporaryFolder& folder, const std::string& style, DType dtype) {
  TrainJob job = small_job(folder);
  if (style == "gpt2") {
    job.model = model_style("gpt2");
    job.model.layers = 2;
    job.model.dim = 28;
    job.model.heads = 4;
    job.model.kv_heads = 4;
    job.model.head_dim = 7;
    job.model.hidden = 45;
    job.model.max_seq = 64;
    job.model.dropout = 0.1;
    job.attention.dropout = {.p = 0.1, .seed = 5};
    job.train.recompute = Recompute::kBlock;
  }
  job.determinism = Determinism::kInvariant;
  job.dtype = dtype;
  job.train.steps = 4;
  job.train.batch = 8;
  job.train.seq_len = 48;
  return job;
}

struct Outcome {
  std::vector<double> losses;
  double held_out = 0;
  std::map<std::string, std::string> tensors;  // bytes by name: weights and moments
};

// Ranks share the CUDA devices; tensors travel through host memory.
TrainResult train_on_cuda(Communicator& world, const TrainJob& job) {
  std::string why;
  const auto devices = static_cast<int>(cuda_devices(why).size());
  const DeviceScope scope({DeviceKind::kCuda, static_cast<std::int8_t>(world.rank() % devices)});
  return train(*staged(whole_group(world)), job, {.on_event = {}, .progress = false});
}

Outcome outcome_of(const TrainJob& job, int threads, DeviceKind kind = DeviceKind::kCpu) {
  Outcome outcome;
  run_thread_ranks(job.mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(threads);
    const TrainResult result =
        kind == DeviceKind::kCuda ? train_on_cuda(world, job) : train(world, job, {.on_event = {}, .progress = false});
    if (world.rank() != 0) return;
    outcome.losses = result.losses;
    outcome.held_out = result.held_out_bits_per_char;
    const CheckpointReader reader(result.checkpoint);
    for (const std::string& name : reader.names()) {
      const Tensor tensor = reader.read(name);
      outcome.tensors[name].assign(tensor.ptr<char>(), static_cast<std::size_t>(tensor->bytes()));
    }
  });
  return outcome;
}

void expect_same_bits(const Outcome& one, const Outcome& other, const std::string& what) {
  ASSERT_EQ(one.losses.size(), other.losses.size()) << what;
  for (std::size_t step = 0; step < one.losses.size(); ++step) {
    ASSERT_EQ(one.losses[step], other.losses[step]) << what << ", step " << step + 1;
  }
  EXPECT_EQ(one.held_out, other.held_out) << what;
  ASSERT_EQ(one.tensors.size(), other.tensors.size()) << what;
  for (const auto& [name, bytes] : one.tensors) EXPECT_TRUE(bytes == other.tensors.at(name)) << what << ": " << name;
}

struct Sharding {
  MeshShape mesh;
  int threads = 1;
  std::int64_t accumulate = 1;
};

void expect_same_bits_on(TrainJob job, const Outcome& alone, const std::vector<Sharding>& shardings,
                         DeviceKind kind = DeviceKind::kCpu) {
  for (const Sharding& sharding : shardings) {
    job.mesh = sharding.mesh;
    job.train.accumulate = sharding.accumulate;
    expect_same_bits(alone, outcome_of(job, sharding.threads, kind), sharding.mesh.text());
  }
}

class InvariantTraining : public ::testing::TestWithParam<std::tuple<const char*, DType>> {};

TEST_P(InvariantTraining, SameBitsOnEveryMesh) {
  const TemporaryFolder folder;
  const TrainJob job = invariant_job(folder, std::get<0>(GetParam()), std::get<1>(GetParam()));
  expect_same_bits_on(job, outcome_of(job, 1),
                      {{.mesh = {}, .threads = 3, .accumulate = 4},
                       {.mesh = mesh_of(2, 1, 1, 1), .threads = 2},
                       {.mesh = mesh_of(8, 1, 1, 1)},
                       {.mesh = mesh_of(1, 2, 1, 1)},
                       {.mesh = mesh_of(1, 8, 1, 1)},
                       {.mesh = mesh_of(1, 1, 4, 1)},
                       {.mesh = mesh_of(2, 2, 1, 1), .accumulate = 2},
                       {.mesh = mesh_of(1, 2, 2, 1)},
                       {.mesh = mesh_of(2, 1, 2, 1, 2)},
                       {.mesh = mesh_of(1, 2, 1, 1, 1, 2)}});
}

INSTANTIATE_TEST_SUITE_P(Models, InvariantTraining,
                         ::testing::Combine(::testing::Values("llama", "gpt2"), ::testing::Values(DType::kF32, DType::kBF16)),
                         [](const auto& param) {
                           return std::string(std::get<0>(param.param)) + "_" + std::string(name_of(std::get<1>(param.param)));
                         });

// On devices, bits are others than the host's, and again the same on every mesh: with tensor cores (llama, bf16) and without.
class InvariantTrainingOnCuda : public testing::OnCuda, public ::testing::WithParamInterface<std::tuple<const char*, DType>> {};

TEST_P(InvariantTrainingOnCuda, SameBitsOnEveryMesh) {
  const TemporaryFolder folder;
  TrainJob job = invariant_job(folder, std::get<0>(GetParam()), std::get<1>(GetParam()));
  job.train.steps = 2;
  job.train.batch = 4;
  const Outcome alone = outcome_of(job, 1, DeviceKind::kCuda);
  EXPECT_NEAR(alone.losses[1], outcome_of(job, 1).losses[1], 2e-3) << "not the host's training";
  expect_same_bits_on(job, alone,
                      {{.mesh = {}, .accumulate = 4},
                       {.mesh = mesh_of(4, 1, 1, 1)},
                       {.mesh = mesh_of(1, 2, 1, 1)},
                       {.mesh = mesh_of(1, 4, 1, 1)},
                       {.mesh = mesh_of(1, 1, 2, 1)},
                       {.mesh = mesh_of(1, 1, 4, 1)},
                       {.mesh = mesh_of(2, 1, 2, 1)},
                       {.mesh = mesh_of(1, 2, 2, 1)}},
                      DeviceKind::kCuda);
}

INSTANTIATE_TEST_SUITE_P(Models, InvariantTrainingOnCuda,
                         ::testing::Values(std::tuple{"llama", DType::kBF16}, std::tuple{"gpt2", DType::kF32}),
                         [](const auto& param) { return std::string(std::get<0>(param.param)); });

TEST(InvariantTraining, SameBitsAfterAHundredSteps) {
  const TemporaryFolder folder;
  std::vector<Sharding> meshes{{.mesh = mesh_of(1, 4, 2, 1)}};
  for (const int ranks : {2, 4, 8}) {
    for (const MeshShape& mesh : {mesh_of(ranks, 1, 1, 1), mesh_of(1, ranks, 1, 1), mesh_of(1, 1, ranks, 1)})
      meshes.push_back({.mesh = mesh});
  }
  for (const auto& [style, dtype] : {std::pair{"llama", DType::kF32}, {"gpt2", DType::kBF16}}) {
    TrainJob job = invariant_job(folder, style, dtype);
    job.model.layers = 1;
    job.train.steps = 100;
    const Outcome alone = outcome_of(job, 1);
    EXPECT_LT(alone.losses.back(), alone.losses.front() - 0.3) << "nothing was learnt";
    expect_same_bits_on(job, alone, meshes);
  }
}

TEST(InvariantTraining, ResumesOnAnotherMeshWithTheSameBits) {
  const TemporaryFolder folder;
  TrainJob job = invariant_job(folder, "gpt2", DType::kF32);
  job.train.steps = 8;
  job.train.checkpoint_every = 5;
  const Outcome whole = outcome_of(job, 1);
  std::filesystem::remove_all(job.train.out + "/checkpoints/step-00000008");
  job.resume = true;
  job.mesh = mesh_of(2, 2, 1, 1);
  const Outcome rest = outcome_of(job, 1);
  ASSERT_EQ(rest.losses.size(), 3u) << "the checkpoint of step 5 was not resumed";
  EXPECT_EQ(rest.losses, std::vector<double>(whole.losses.begin() + 5, whole.losses.end()));
  EXPECT_TRUE(rest.tensors == whole.tensors);
}

// What cannot be promised, and the choice that each message names.
TEST(InvariantTraining, RefusesWhatItCannotPromise) {
  const TemporaryFolder folder;
  const auto expect_refusal = [&](const std::function<void(TrainJob&)>& change, const std::string& remedy) {
    TrainJob job = invariant_job(folder, "llama", DType::kF32);
    change(job);
    std::atomic<int> refused{0};
    EXPECT_THROW(run_thread_ranks(job.mesh.ranks(), {},
                                  [&](Communicator& world) {
                                    try {
                                      train(world, job, {.on_event = {}, .progress = false});
                                    } catch (const Error& error) {
                                      EXPECT_EQ(error.code(), ErrorCode::kBadInput);
                                      EXPECT_THAT(error.what(), ::testing::HasSubstr(remedy));
                                      ++refused;
                                      throw;
                                    }
                                  }),
                 Error);
    EXPECT_EQ(refused, job.mesh.ranks()) << "not refused on every rank: " << remedy;
    EXPECT_FALSE(std::filesystem::exists(job.train.out)) << remedy;
  };
  expect_refusal([](TrainJob& job) { job.mesh = mesh_of(1, 1, 1, 2); }, "use mesh.tensor=1");
  expect_refusal([](TrainJob& job) { job.train.sequence_parallel = true; }, "use train.sequence_parallel=false");
  expect_refusal([](TrainJob& job) { job.layout = Layout::kContiguous; }, "layout contiguous");
  expect_refusal([](TrainJob& job) { job.mesh = mesh_of(1, 3, 1, 1); }, "use 2 ranks on ring, rows and ulysses together");
  expect_refusal([](TrainJob& job) { job.mesh = mesh_of(1, 4, 4, 1); }, "use 8 ranks on ring, rows and ulysses together");
  expect_refusal([](TrainJob& job) { job.train.seq_len = 50; }, "multiple of the 16 leaves that it is summed in; use 64");
  expect_refusal([](TrainJob& job) { job.mesh = mesh_of(3, 1, 1, 1); }, "mesh.data 3 does not divide; use mesh.data=2");
  expect_refusal(
      [](TrainJob& job) {
        job.mesh = mesh_of(4, 1, 1, 1);
        job.train.batch = 6;
      },
      "use mesh.data=2 or train.batch=8");
}

}  // namespace
}  // namespace dattn
