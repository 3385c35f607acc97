// The training loop: the same losses on every mesh and from run to run, resuming, damaged checkpoints, divergence.
#include <cmath>
#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "tests/plugins/small_job.h"

namespace dattn {
namespace {

namespace fs = std::filesystem;

struct Variant {
  const char* name;
  MeshShape mesh;
  Layout layout = Layout::kZigzag;
  bool sequence_parallel = false;
  std::int64_t accumulate = 1;
  std::int64_t batch = 3;
};

TrainJob job_of(const Variant& variant, const TemporaryFolder& folder) {
  TrainJob job = small_job(folder);
  job.mesh = variant.mesh;
  job.layout = variant.layout;
  job.train.sequence_parallel = variant.sequence_parallel;
  job.train.accumulate = variant.accumulate;
  job.train.batch = variant.batch;
  return job;
}

// The losses of one rank, for a batch size.
const std::vector<double>& reference_losses(std::int64_t batch) {
  static std::map<std::int64_t, std::vector<double>> known;
  if (!known.count(batch)) {
    const TemporaryFolder folder;
    known[batch] = train_on_threads(job_of({.name = "one", .mesh = {}, .batch = batch}, folder)).losses;
  }
  return known[batch];
}

class Meshes : public testing::TestWithParam<Variant> {};

// Softcap and ALiBi change the losses, and are the same on every mesh.
TEST(Training, ScoreTermsHoldOnEveryMesh) {
  const auto losses_of = [](const MeshShape& mesh, bool terms) {
    const TemporaryFolder folder;
    TrainJob job = job_of({.name = "terms", .mesh = mesh}, folder);
    if (terms) {
      job.attention.softcap = 2.0;
      job.attention.alibi_slopes = std::vector<double>(static_cast<std::size_t>(job.model.heads), 0.05);
    }
    return train_on_threads(job).losses;
  };
  const std::vector<double> alone = losses_of({}, true);
  EXPECT_NE(alone, losses_of({}, false));
  const std::vector<double> spread = losses_of(mesh_of(1, 2, 2, 1), true);
  for (std::size_t step = 0; step < alone.size(); ++step) EXPECT_NEAR(spread[step], alone[step], 1e-5 * alone[step]);
}

TEST_P(Meshes, LossesAgreeWithOneRank) {
  const TemporaryFolder folder;
  const std::vector<double> losses = train_on_threads(job_of(GetParam(), folder)).losses;
  const std::vector<double>& expected = reference_losses(GetParam().batch);
  ASSERT_EQ(losses.size(), 20u);
  for (std::size_t step = 0; step < losses.size(); ++step) {
    EXPECT_NEAR(losses[step], expected[step], 1e-5 * expected[step]) << "step " << step + 1;
  }
  EXPECT_LT(losses.back(), losses.front() - 0.3) << "nothing was learnt";
}

INSTANTIATE_TEST_SUITE_P(
    All, Meshes,
    testing::Values(
        Variant{.name = "data2", .mesh = mesh_of(2, 1, 1, 1)}, Variant{.name = "tensor2", .mesh = mesh_of(1, 1, 1, 2)},
        Variant{.name = "tensor3", .mesh = mesh_of(1, 1, 1, 3)},
        Variant{.name = "tensor2_sequence_parallel", .mesh = mesh_of(1, 1, 1, 2), .sequence_parallel = true},
        Variant{.name = "tensor4_sequence_parallel", .mesh = mesh_of(1, 1, 1, 4), .sequence_parallel = true},
        Variant{.name = "ulysses2", .mesh = mesh_of(1, 1, 2, 1)}, Variant{.name = "ring2", .mesh = mesh_of(1, 2, 1, 1)},
        Variant{.name = "ring3_striped", .mesh = mesh_of(1, 3, 1, 1), .layout = Layout::kStriped},
        Variant{.name = "ring2_contiguous", .mesh = mesh_of(1, 2, 1, 1), .layout = Layout::kContiguous},
        Variant{.name = "grid", .mesh = mesh_of(1, 2, 1, 1, 2)},
        Variant{.name = "double_ring_balanced", .mesh = mesh_of(1, 2, 1, 1, 1, 2), .layout = Layout::kBalanced},
        Variant{.name = "hybrid", .mesh = mesh_of(1, 2, 2, 1)}, Variant{.name = "data2_tensor2", .mesh = mesh_of(2, 1, 1, 2)},
        Variant{.name = "data2_ring2", .mesh = mesh_of(2, 2, 1, 1)},
        Variant{.name = "ulysses2_tensor2_sequence_parallel", .mesh = mesh_of(1, 1, 2, 2), .sequence_parallel = true},
        Variant{.name = "eight_ranks", .mesh = mesh_of(2, 2, 1, 2)},
        Variant{.name = "more_data_ranks_than_rows", .mesh = mesh_of(4, 1, 1, 1)},
        Variant{.name = "accumulated", .mesh = {}, .accumulate = 3},
        Variant{.name = "accumulated_data2", .mesh = mesh_of(2, 1, 1, 1), .accumulate = 2, .batch = 4}),
    [](const auto& variant) { return variant.param.name; });

TEST(Training, RepeatsBitByBit) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.mesh = mesh_of(1, 2, 1, 2);
  const std::vector<double> once = train_on_threads(job).losses;
  EXPECT_EQ(once, train_on_threads(job).losses);
  job.train.seed = 2;
  EXPECT_NE(once, train_on_threads(job).losses);
}

TEST(Training, RecomputationAndDropoutKeepTheCurve) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.model.dropout = 0.1;
  const std::vector<double> one = train_on_threads(job).losses;
  job.train.recompute = Recompute::kBlock;
  job.mesh = mesh_of(2, 2, 1, 2);
  job.train.sequence_parallel = true;
  const std::vector<double> other = train_on_threads(job).losses;
  for (std::size_t step = 0; step < one.size(); ++step) EXPECT_NEAR(one[step], other[step], 1e-5 * one[step]);
}

// The same pairs are dropped on every mesh, in forward, backward and recomputation, and none in evaluation.
TEST(Training, AttentionDropoutKeepsTheCurve) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  const std::vector<double> none = train_on_threads(job).losses;
  job.attention.dropout = {.p = 0.2, .seed = 7};
  const std::vector<double> one = train_on_threads(job).losses;
  EXPECT_NE(one, none);
  for (const MeshShape& mesh : {mesh_of(2, 1, 1, 1), mesh_of(1, 2, 2, 1), mesh_of(2, 1, 1, 2)}) {
    job.mesh = mesh;
    job.train.recompute = mesh == mesh_of(1, 2, 2, 1) ? Recompute::kBlock : Recompute::kNone;
    const std::vector<double> other = train_on_threads(job).losses;
    for (std::size_t step = 0; step < one.size(); ++step) EXPECT_NEAR(one[step], other[step], 1e-5 * one[step]) << mesh.text();
  }
}

TEST(Training, EvaluatesWithoutAttentionDropout) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.train.steps = 1;
  job.train.learning_rate = 0;  // so that both evaluate the same weights
  const TrainResult plain = train_on_threads(job);
  job.attention.dropout.p = 0.4;
  const TrainResult dropping = train_on_threads(job);
  EXPECT_NE(plain.loss, dropping.loss);
  EXPECT_EQ(plain.held_out_bits_per_char, dropping.held_out_bits_per_char);
}

TEST(Training, RefusesMoreCallsThanAttentionDropoutHasRoomFor) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.attention.dropout.p = 0.1;
  job.train.steps = std::int64_t{1} << 31;
  try {
    train_on_threads(job);
    FAIL() << "streams would repeat";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("2147483648 x model.layers 2 are 4294967296"));
  }
}

TEST(Training, Bf16StaysNearFp32OnEveryMesh) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.dtype = DType::kBF16;
  job.train.sample_length = 5;
  const std::vector<double> one = train_on_threads(job).losses;
  job.mesh = mesh_of(1, 2, 1, 2);
  const std::vector<double> other = train_on_threads(job).losses;
  const std::vector<double>& fp32 = reference_losses(job.train.batch);
  EXPECT_NE(one, fp32);
  for (std::size_t step = 0; step < one.size(); ++step) {
    EXPECT_NEAR(one[step], fp32[step], 0.02 * fp32[step]) << "step " << step + 1;
    EXPECT_NEAR(other[step], one[step], 0.01 * one[step]) << "step " << step + 1;
  }
}

// A run of 8 steps with checkpoints after 4 and 8.
TrainJob resumable(const TemporaryFolder& folder, const MeshShape& mesh) {
  TrainJob job = small_job(folder);
  job.mesh = mesh;
  job.train.steps = 8;
  job.train.checkpoint_every = 4;
  return job;
}

std::vector<double> tail_of(const std::vector<double>& losses, std::size_t from) {
  return {losses.begin() + static_cast<std::ptrdiff_t>(from), losses.end()};
}

fs::path checkpoint_of(const TrainJob& job, int step) {
  for (const auto& entry : fs::directory_iterator(fs::path(job.train.out) / "checkpoints")) {
    if (entry.path().filename().string().find("0000" + std::to_string(step)) != std::string::npos) return entry.path();
  }
  ADD_FAILURE() << "no checkpoint of step " << step;
  return {};
}

TEST(Resuming, ContinuesTheSameBits) {
  for (const MeshShape& mesh : {mesh_of(1, 1, 1, 1), mesh_of(1, 2, 1, 2)}) {
    const TemporaryFolder folder;
    TrainJob job = resumable(folder, mesh);
    const TrainResult whole = train_on_threads(job);
    fs::remove_all(checkpoint_of(job, 8));
    job.resume = true;
    const TrainResult rest = train_on_threads(job);
    EXPECT_EQ(rest.losses, tail_of(whole.losses, 4)) << mesh.text();
    EXPECT_EQ(rest.held_out_bits_per_char, whole.held_out_bits_per_char);
  }
}

TEST(Resuming, PassesOverADamagedCheckpoint) {
  const TemporaryFolder folder;
  TrainJob job = resumable(folder, mesh_of(1, 2, 1, 1));
  const TrainResult whole = train_on_threads(job);
  for (const auto& entry : fs::directory_iterator(checkpoint_of(job, 8))) {
    if (entry.path().extension() == ".safetensors") fs::resize_file(entry.path(), fs::file_size(entry.path()) / 2);
  }
  job.resume = true;
  EXPECT_EQ(train_on_threads(job).losses, tail_of(whole.losses, 4));
}

TEST(Resuming, WorksOnAnotherMesh) {
  const TemporaryFolder folder;
  TrainJob job = resumable(folder, mesh_of(1, 2, 1, 1));
  const TrainResult whole = train_on_threads(job);
  job.resume = true;
  for (const MeshShape& mesh : {mesh_of(2, 1, 1, 2), mesh_of(1, 1, 1, 1), mesh_of(1, 1, 2, 3)}) {
    fs::remove_all(checkpoint_of(job, 8));
    job.mesh = mesh;
    const TrainResult rest = train_on_threads(job);
    ASSERT_EQ(rest.losses.size(), 4u);
    for (std::size_t i = 0; i < 4; ++i)
      EXPECT_NEAR(rest.losses[i], whole.losses[i + 4], 1e-5 * whole.losses[i + 4]) << mesh.text();
  }
}

TEST(Resuming, RefusesAnotherModel) {
  const TemporaryFolder folder;
  TrainJob job = resumable(folder, mesh_of(1, 2, 1, 1));
  train_on_threads(job);
  job.resume = true;
  job.model.hidden = 48;
  try {
    train_on_threads(job);
    FAIL() << "a checkpoint of another model was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    EXPECT_THAT(error.what(), testing::HasSubstr("model.hidden is 40 there and 48 in the config"));
  }
}

TEST(Training, EndsOnDivergenceWithTheLastCheckpoint) {
  const TemporaryFolder folder;
  TrainJob job = resumable(folder, mesh_of(2, 1, 1, 1));
  job.train.checkpoint_every = 1;
  job.train.schedule = ScheduleKind::kConstant;
  job.train.learning_rate = 1e30;
  job.train.warmup_steps = 0;
  try {
    train_on_threads(job);
    FAIL() << "training went on with values that are not finite";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDiverged);
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("diverged at step"), testing::HasSubstr("learning rate 1e+30"),
                                             testing::HasSubstr("checkpoints/step-00000001")));
  }
  EXPECT_TRUE(fs::exists(checkpoint_of(job, 1)));
}

TEST(Training, LeavesARunFolder) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.mesh = mesh_of(1, 1, 2, 1);
  job.train.sample_length = 10;
  job.train.sample_prompt = "QQ";  // not in the text: a line of the text takes its place
  std::vector<nlohmann::json> events;
  run_thread_ranks(2, {}, [&](Communicator& world) {
    train(world, job,
          {.on_event = [&](const std::string& line) { events.push_back(nlohmann::json::parse(line)); }, .progress = false});
  });
  ASSERT_EQ(events.size(), 22u);  // 20 steps, the held-out loss, done
  for (std::size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(events[i]["event"], "step");
    EXPECT_EQ(events[i]["step"], i + 1);
    EXPECT_GT(events[i]["grad_norm"].get<double>(), 0);
    EXPECT_GT(events[i]["bytes_sent"].get<double>(), 0);
    EXPECT_EQ(events[i]["bytes_sent"], events[0]["bytes_sent"]) << "equal steps send equally much";
  }
  EXPECT_EQ(events.back()["event"], "done");
  EXPECT_GT(events.back()["bigram_bits_per_char"].get<double>(), 0);
  const fs::path run = job.train.out;
  for (const char* name : {"config.yaml", "metrics.jsonl", "sample.txt", "tensorboard", "checkpoints"}) {
    EXPECT_TRUE(fs::exists(run / name)) << name;
  }
  train_on_threads(job);
  EXPECT_TRUE(fs::exists(run.string() + ".1")) << "the older run was not set aside";
}

TEST(Training, RefusesAMissingTextOnEveryRank) {
  const TemporaryFolder folder;
  TrainJob job = small_job(folder);
  job.data.path = folder / "absent.txt";
  job.mesh = mesh_of(2, 1, 1, 1);
  std::atomic<int> refused{0};
  EXPECT_THROW(run_thread_ranks(2, {},
                                [&](Communicator& world) {
                                  try {
                                    train(world, job, {.on_event = {}, .progress = false});
                                  } catch (const Error& error) {
                                    if (error.code() == ErrorCode::kBadInput &&
                                        std::string(error.what()).find("absent.txt") != std::string::npos)
                                      ++refused;
                                    throw;
                                  }
                                }),
               Error);
  EXPECT_EQ(refused, 2);
  EXPECT_FALSE(fs::exists(job.train.out));
}

}  // namespace
}  // namespace dattn
