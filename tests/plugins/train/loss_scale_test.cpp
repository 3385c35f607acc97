// Training in fp16: the loss scale's rules, curves beside fp32's, and overflows, which skip a step on all ranks alike.
#include "plugins/train/loss_scale.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "tests/plugins/small_job.h"

namespace dattn {
namespace {

TEST(LossScale, RisesAfterGoodStepsAndFallsAtAnOverflow) {
  LossScale scale({.initial = 8, .growth = 4, .backoff = 0.25, .growth_interval = 3}, DType::kF16);
  for (int step = 0; step < 2; ++step) scale.step_taken();
  EXPECT_EQ(scale.scale(), 8);
  EXPECT_TRUE(scale.step_skipped());
  EXPECT_EQ(scale.scale(), 2);
  for (int step = 0; step < 2; ++step) scale.step_taken();  // those before the overflow no longer count
  EXPECT_EQ(scale.scale(), 2);
  scale.step_taken();
  EXPECT_EQ(scale.scale(), 8);
  EXPECT_TRUE(scale.step_skipped());
  EXPECT_TRUE(scale.step_skipped());
  EXPECT_EQ(scale.scale(), LossScale::kLeast);  // not below
  EXPECT_FALSE(scale.step_skipped());
  EXPECT_EQ(scale.skipped(), 4);
}

TEST(LossScale, ComesBackFromACheckpoint) {
  const LossScaleConfig config{.initial = 256, .growth_interval = 2};
  LossScale scale(config, DType::kF16), restored(config, DType::kF16);
  scale.step_skipped();
  scale.step_taken();
  std::map<std::string, std::string> values;
  scale.save(values);
  restored.restore(values);
  EXPECT_EQ(restored.scale(), 128);
  EXPECT_EQ(restored.skipped(), 1);
  restored.step_taken();
  EXPECT_EQ(restored.scale(), 256);
  LossScale fresh(config, DType::kF16);
  fresh.restore({});  // of a run in another type
  EXPECT_EQ(fresh.scale(), 256);
}

TEST(LossScale, IsForFp16Alone) {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    LossScale scale({}, type);
    scale.step_taken();
    EXPECT_FALSE(scale.on());
    EXPECT_EQ(scale.scale(), 1);
  }
}

TrainJob fp16_job(const TemporaryFolder& folder, const MeshShape& mesh) {
  TrainJob job = small_job(folder);
  job.mesh = mesh;
  job.dtype = DType::kF16;
  return job;
}

void expect_near(const std::vector<double>& losses, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(losses.size(), expected.size());
  for (std::size_t step = 0; step < losses.size(); ++step)
    EXPECT_NEAR(losses[step], expected[step], tolerance * expected[step]) << "step " << step + 1;
}

TEST(TrainingInFp16, KeepsTheCurveOfFp32OnEveryMesh) {
  const TemporaryFolder folder;
  const std::vector<double> exact = train_on_threads(small_job(folder)).losses;
  const std::vector<double> alone = train_on_threads(fp16_job(folder, {})).losses;
  EXPECT_NE(alone, exact);
  expect_near(alone, exact, 2e-3);
  for (const MeshShape& mesh : {mesh_of(2, 1, 1, 1), mesh_of(1, 2, 2, 1), mesh_of(1, 1, 1, 2), mesh_of(1, 2, 1, 2)})
    expect_near(train_on_threads(fp16_job(folder, mesh)).losses, exact, 2e-3);
}

struct Watched {
  TrainResult result;
  std::vector<std::string> events;
};

// The gradients of one rank overflow in step `at`; the weights of every rank are the same before and after it.
Watched train_with_overflow(const TrainJob& job, int rank, std::int64_t at) {
  Watched run;
  run_thread_ranks(job.mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(1);
    std::vector<Tensor> before;
    TrainHooks hooks{.progress = false};
    hooks.on_gradients = [&](std::int64_t step, std::span<Parameter* const> parameters) {
      if (step == at) {
        for (const Parameter* parameter : parameters) before.push_back(parameter->value.clone());
        if (world.rank() == rank) parameters.back()->gradient.ptr<float>()[3] = std::numeric_limits<float>::infinity();
      }
      if (step != at + 1) return;
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        const Tensor& now = parameters[i]->value;
        EXPECT_EQ(std::memcmp(now.ptr<void>(), before[i].ptr<void>(), static_cast<std::size_t>(now->bytes())), 0)
            << "rank " << world.rank() << " stepped " << parameters[i]->name;
      }
    };
    if (world.rank() == 0) hooks.on_event = [&](const std::string& line) { run.events.push_back(line); };
    TrainResult mine = train(world, job, hooks);
    if (world.rank() == 0) run.result = std::move(mine);
  });
  return run;
}

TEST(TrainingInFp16, AnOverflowOnOneRankSkipsTheStepOnAll) {
  const TemporaryFolder folder;
  const Watched alone = train_with_overflow(fp16_job(folder, {}), 0, 3);
  for (const MeshShape& mesh : {mesh_of(2, 2, 1, 1), mesh_of(1, 2, 1, 2)}) {
    const Watched run = train_with_overflow(fp16_job(folder, mesh), 2, 3);
    expect_near(run.result.losses, alone.result.losses, 2e-3);
    std::vector<std::string> skipped;
    for (const std::string& event : run.events) {
      if (event.find("\"skipped\"") != event.npos) skipped.push_back(event);
    }
    EXPECT_THAT(skipped,
                testing::ElementsAre(R"({"event":"skipped","step":4,"loss_scale":65536.0,"next_loss_scale":32768.0})"));
  }
}

// A scale that is too large overflows in the kernels themselves, and comes down by itself.
TEST(TrainingInFp16, AScaleThatIsTooLargeComesDown) {
  const TemporaryFolder folder;
  TrainJob job = fp16_job(folder, mesh_of(1, 2, 1, 1));
  job.train.loss_scale.initial = 0x1p30;
  const Watched run = train_with_overflow(job, 0, -2);
  EXPECT_LT(run.result.losses.back(), run.result.losses.front() - 0.2) << "nothing was learnt";
  std::int64_t skipped = 0;
  double scale = 0;
  for (const std::string& line : run.events) {
    const auto event = nlohmann::json::parse(line);
    skipped += event["event"] == "skipped";
    if (event["event"] == "step") scale = event["loss_scale"];
  }
  EXPECT_GE(skipped, 3);
  EXPECT_EQ(scale, std::ldexp(1.0, static_cast<int>(30 - skipped)));
}

TEST(TrainingInFp16, DivergesWhereTheLeastScaleOverflows) {
  const TemporaryFolder folder;
  TrainJob job = fp16_job(folder, {});
  job.train.loss_scale.initial = 1;
  try {
    train_with_overflow(job, 0, 3);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDiverged);
    EXPECT_THAT(error.what(), testing::HasSubstr("diverged at step 4"));
  }
}

// Skipped steps, the scale and its age are in the checkpoint: the resumed run has the bits of the uninterrupted one.
TEST(TrainingInFp16, ResumesWithTheScaleItHad) {
  const TemporaryFolder folder;
  TrainJob job = fp16_job(folder, mesh_of(1, 2, 1, 1));
  job.train.loss_scale = {.initial = 0x1p24, .growth_interval = 7};
  job.train.steps = 20;
  job.train.schedule = ScheduleKind::kConstant;
  const std::vector<double> whole = train_on_threads(job).losses;
  job.train.steps = 11;
  train_on_threads(job);
  job.train.steps = 20;
  job.resume = true;
  const std::vector<double> rest = train_on_threads(job).losses;
  EXPECT_EQ(rest, std::vector<double>(whole.begin() + 11, whole.end()));
}

}  // namespace
}  // namespace dattn
