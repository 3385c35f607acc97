// The config's `train` and `data` sections: plain values for the training loop.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "core/config/config.h"
#include "core/nn/transformer.h"
#include "plugins/train/loss_scale.h"

namespace dattn {

enum class ScheduleKind { kCosine, kLinear, kConstant };

template <>
struct ConfigNames<ScheduleKind> {
  static constexpr std::array<std::pair<std::string_view, ScheduleKind>, 3> kAll{
      {{"cosine", ScheduleKind::kCosine}, {"linear", ScheduleKind::kLinear}, {"constant", ScheduleKind::kConstant}}};
};

template <>
struct ConfigNames<Recompute> {
  static constexpr std::array<std::pair<std::string_view, Recompute>, 2> kAll{
      {{"none", Recompute::kNone}, {"block", Recompute::kBlock}}};
};

struct DataConfig {
  std::string path;
  double held_out = 0.1;
};

struct TrainConfig {
  std::int64_t steps = 300;
  std::int64_t batch = 8;
  std::int64_t seq_len = 512;
  std::int64_t seed = 1;
  std::int64_t accumulate = 1;
  double learning_rate = 3e-3;
  double min_learning_rate = 3e-4;
  ScheduleKind schedule = ScheduleKind::kCosine;
  std::int64_t warmup_steps = 20;
  double weight_decay = 0.1;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double clip_norm = 1.0;
  LossScaleConfig loss_scale;
  Recompute recompute = Recompute::kNone;
  bool sequence_parallel = false;
  std::int64_t eval_every = 100;
  std::int64_t eval_batches = 8;
  std::int64_t checkpoint_every = 0;
  std::int64_t keep_checkpoints = 2;
  std::int64_t sample_length = 400;
  std::string sample_prompt;
  std::string out;
};

template <class V>
void describe(V& v, DataConfig& c) {
  v("path", c.path, "any text file, read as bytes; relative to where the command is called");
  v("held_out", c.held_out, "share of the file, at its end, that is never trained on");
}

template <class V>
void describe(V& v, TrainConfig& c) {
  v("steps", c.steps, "optimizer steps");
  v("batch", c.batch, "sequences per step over the whole job");
  v("seq_len", c.seq_len, "tokens per sequence");
  v("seed", c.seed, "of initial weights, data order, dropout and the sample");
  v("accumulate", c.accumulate, "parts a step's batch is cut into, one after the other; gradients add up");
  v("learning_rate", c.learning_rate, "greatest learning rate");
  v("min_learning_rate", c.min_learning_rate, "learning rate at the last step (cosine, linear)");
  v("schedule", c.schedule, "learning rate after the warm-up");
  v("warmup_steps", c.warmup_steps, "steps over which the learning rate rises from 0; clamped to steps");
  v("weight_decay", c.weight_decay, "decoupled decay of matrices (AdamW)");
  v("beta1", c.beta1, "decay of AdamW's first moment");
  v("beta2", c.beta2, "decay of AdamW's second moment");
  v("epsilon", c.epsilon, "added to the root of AdamW's second moment");
  v("clip_norm", c.clip_norm, "greatest global gradient norm; 0 = no clipping");
  v("loss_scale", c.loss_scale, "for dtype fp16");
  v("recompute", c.recompute, "none keeps activations; block keeps each block's input and recomputes the rest");
  v("sequence_parallel", c.sequence_parallel, "cut the rows between the blocks over the tensor axis");
  v("eval_every", c.eval_every, "steps between held-out evaluations; 0 = at the end only");
  v("eval_batches", c.eval_batches, "batches of a held-out evaluation; 0 = all of the held-out text");
  v("checkpoint_every", c.checkpoint_every, "steps between checkpoints; 0 = at the end only");
  v("keep_checkpoints", c.keep_checkpoints, "newest checkpoints that are kept");
  v("sample_length", c.sample_length, "characters of the sample written at the end; 0 = none");
  v("sample_prompt", c.sample_prompt, "text that the sample continues; empty = the first held-out line");
  v("out", c.out, "run folder; empty = runs/ and the config's name");
}

void check(const DataConfig& c, const ConfigCheck& at);
void check(const TrainConfig& c, const ConfigCheck& at);

}  // namespace dattn
