// A training job small enough to run in a fraction of a second, for tests: Llama style, 6 query and 3 KV heads (so that
// tensor parts hold KV heads in common), lengths that no mesh divides.
#pragma once

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>

#include "core/base/philox.h"
#include "core/base/threads.h"
#include "parallel/comm/thread.h"
#include "plugins/train/trainer.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {

// A folder that is removed at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    static std::atomic<int> count{0};
    path_ = std::filesystem::temp_directory_path() / ("dattn-test-" + std::to_string(getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// Words of a few letters in random order: a text that a small model learns quickly.
inline std::string small_text(std::size_t words) {
  constexpr const char* kWords[] = {"the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "again"};
  std::string text;
  for (std::size_t i = 0; i < words; ++i) {
    text += kWords[static_cast<std::size_t>(philox_uniform(3, 0, i) * 12)];
    text += i % 9 == 8 ? ".\n" : " ";
  }
  return text;
}

inline TrainJob small_job(const TemporaryFolder& folder, const std::string& run = "run") {
  const std::string text = folder / "text.txt";
  if (!std::filesystem::exists(text)) std::ofstream(text) << small_text(1000);
  TrainJob job;
  job.model = model_style("llama");
  job.model.layers = 2;
  job.model.dim = 24;
  job.model.heads = 6;
  job.model.kv_heads = 3;
  job.model.head_dim = 8;
  job.model.hidden = 40;
  job.data.path = text;
  job.train.steps = 20;
  job.train.batch = 3;
  job.train.seq_len = 23;
  job.train.warmup_steps = 4;
  job.train.learning_rate = 3e-3;
  job.train.eval_every = 0;
  job.train.eval_batches = 2;
  job.train.sample_length = 0;
  job.train.out = folder / run;
  job.config_yaml = "train: {steps: 20}\n";
  return job;
}

// Trains on threads, one for each rank of the job's mesh; the first rank's result.
inline TrainResult train_on_threads(const TrainJob& job) {
  TrainResult result;
  run_thread_ranks(job.mesh.ranks(), {}, [&](Communicator& world) {
    set_num_threads(1);  // too little work to share
    TrainResult mine = train(world, job, {.on_event = {}, .progress = false});
    if (world.rank() == 0) result = std::move(mine);
  });
  return result;
}

}  // namespace dattn
