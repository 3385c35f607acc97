// Generation: the cache against recomputing the whole context, the same text on every mesh, sampling.
#include "plugins/infer/generate.h"

#include <array>
#include <cmath>

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "tests/core/device/on_cuda.h"
#include "tests/plugins/small_job.h"

namespace dattn {
namespace {

// One trained model of each kind of positions, shared by the tests of this file.
const std::string& trained_run(const std::string& position) {
  static const TemporaryFolder folder;
  static std::map<std::string, std::string> runs;
  if (!runs.count(position)) {
    TrainJob job = small_job(folder, position);
    job.train.seq_len = 40;  // also the window: more than one block of the cache
    job.train.steps = 30;
    job.model.position = position;
    job.model.max_seq = 40;
    job.mesh = mesh_of(1, 1, 1, 2);
    runs[position] = train_on_threads(job).run_dir;
  }
  return runs[position];
}

GenerateResult generate_on_threads(const MeshShape& mesh, const std::string& run, const std::string& prompt,
                                   const GenerateOptions& options) {
  GenerateResult result;
  run_thread_ranks(mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(1);
    const GenerateResult mine = generate(world, mesh, run, prompt, options, {});
    if (world.rank() == 0) result = mine;
  });
  return result;
}

class Positional : public ::testing::TestWithParam<const char*> {};

// 70 tokens after the prompt: the window of 40 is restarted more than once.
TEST_P(Positional, CacheEqualsRecomputing) {
  GenerateOptions options;
  options.max_tokens = 70;
  options.sampling.greedy = true;
  const std::string& run = trained_run(GetParam());
  const GenerateResult cached = generate_on_threads({}, run, "the cat ", options);
  options.use_cache = false;
  EXPECT_EQ(cached.text, generate_on_threads({}, run, "the cat ", options).text);
  EXPECT_EQ(cached.tokens.size(), 70u);
}

TEST_P(Positional, EveryMeshWritesTheSame) {
  GenerateOptions options;
  options.max_tokens = 60;
  options.sampling = {.temperature = 0.9, .top_k = 8, .top_p = 0.95, .seed = 5};
  const std::string& run = trained_run(GetParam());
  const std::string expected = generate_on_threads({}, run, "then it ran ", options).text;
  for (const MeshShape& mesh :
       {mesh_of(1, 2, 1, 1), mesh_of(1, 1, 2, 1), mesh_of(1, 1, 1, 2), mesh_of(2, 1, 1, 1), mesh_of(1, 2, 2, 1),
        mesh_of(1, 3, 1, 2), mesh_of(1, 1, 4, 1), mesh_of(1, 1, 2, 3), mesh_of(1, 2, 1, 1, 2, 2)}) {
    EXPECT_EQ(generate_on_threads(mesh, run, "then it ran ", options).text, expected) << mesh.text();
  }
  options.sampling.seed = 6;
  EXPECT_NE(generate_on_threads({}, run, "then it ran ", options).text, expected);
}

INSTANTIATE_TEST_SUITE_P(All, Positional, ::testing::Values("rope", "learned"),
                         [](const auto& position) { return position.param; });

// Tokens as launches of a graph, over restarts of the window, and kernel by kernel.
class GenerationOnCuda : public testing::OnCuda {};

TEST_F(GenerationOnCuda, GraphsWriteTheSame) {
  GenerateOptions options;
  options.max_tokens = 60;
  options.sampling = {.temperature = 0.9, .top_k = 8, .top_p = 0.95, .seed = 5};
  for (const char* position : {"rope", "learned"}) {
    const std::string& run = trained_run(position);
    GenerateResult with, without;
    run_thread_ranks(1, {}, [&](Communicator& world) {
      const DeviceScope scope(testing::kCuda);
      options.graphs = true;
      with = generate(world, {}, run, "then it ran ", options, {});
      options.graphs = false;
      without = generate(world, {}, run, "then it ran ", options, {});
    });
    EXPECT_EQ(with.tokens, without.tokens);
    EXPECT_GT(with.graph_launches, 40);
    EXPECT_EQ(without.graph_launches, 0);
  }
}

TEST(Generation, SpreadsTheCacheOverRing) {
  GenerateOptions options;
  options.max_tokens = 4;
  const std::string prompt = "the cat sat on a mat and then it ran";  // 36 symbols, 39 cached: blocks of 32 and 7
  std::mutex mutex;
  std::vector<std::int64_t> cached(2);
  const std::string& run = trained_run("rope");
  run_thread_ranks(2, {}, [&](Communicator& world) {
    const GenerateResult result = generate(world, mesh_of(1, 2, 1, 1), run, prompt, options, {});
    const std::lock_guard lock(mutex);
    cached[static_cast<std::size_t>(world.rank())] = result.cached_positions;
  });
  EXPECT_EQ(cached, (std::vector<std::int64_t>{32, 7}));
}

TEST(Generation, StreamsWhatItReturns) {
  GenerateOptions options;
  options.max_tokens = 12;
  std::string streamed;
  const std::string& run = trained_run("rope");
  run_thread_ranks(2, {}, [&](Communicator& world) {
    const GenerateResult result =
        generate(world, mesh_of(1, 2, 1, 1), run, "", options, [&](const std::string& text) { streamed += text; });
    if (world.rank() == 0) {
      EXPECT_EQ(result.text, streamed);
    }
  });
  EXPECT_EQ(streamed.size(), 12u);
}

TEST(Generation, RefusesUnknownSymbols) {
  EXPECT_THROW(generate_on_threads(mesh_of(1, 2, 1, 1), trained_run("rope"), "\x01", {}), Error);
  EXPECT_THROW(generate_on_threads({}, "/nonexistent", "a", {}), Error);
}

TEST(Sampler, FollowsTheDistribution) {
  const std::array<float, 4> logits{std::log(0.5f), std::log(0.25f), std::log(0.15f), std::log(0.1f)};
  const auto shares = [&](const SamplingOptions& options) {
    std::array<double, 4> counts{};
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i)
      counts[static_cast<std::size_t>(sample(logits, options, static_cast<std::uint64_t>(i)))] += 1.0 / kDraws;
    return counts;
  };
  const auto expect = [](const std::array<double, 4>& got, const std::array<double, 4>& want) {
    for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(got[i], want[i], 0.015) << "token " << i;
  };
  expect(shares({}), {0.5, 0.25, 0.15, 0.1});
  expect(shares({.top_k = 2}), {2.0 / 3, 1.0 / 3, 0, 0});
  expect(shares({.top_p = 0.8}), {0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0});
  expect(shares({.temperature = 0.5}), {0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345});
  expect(shares({.greedy = true}), {1, 0, 0, 0});
}

TEST(Sampler, RefusesBadOptions) {
  EXPECT_THROW(check({.temperature = 0}), Error);
  EXPECT_THROW(check({.top_k = -1}), Error);
  EXPECT_THROW(check({.top_p = 0}), Error);
  EXPECT_THROW(check({.top_p = 1.5}), Error);
}

}  // namespace
}  // namespace dattn
