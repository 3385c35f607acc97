#include "plugins/train/train_config.h"

namespace dattn {

void check(const DataConfig& c, const ConfigCheck& at) {
  at.require("held_out", c.held_out >= 0 && c.held_out <= 0.9, "must lie in [0, 0.9]");
}

void check(const TrainConfig& c, const ConfigCheck& at) {
  at.require("steps", c.steps >= 1, "must be at least 1");
  at.require("batch", c.batch >= 1, "must be at least 1");
  at.require("seq_len", c.seq_len >= 1, "must be at least 1");
  at.require("seed", c.seed >= 0, "must be at least 0");
  at.require("accumulate", c.accumulate >= 1, "must be at least 1");
  at.require("accumulate", c.batch % c.accumulate == 0, "must divide batch ({})", c.batch);
  at.require("learning_rate", c.learning_rate >= 0, "must be at least 0");
  at.require("min_learning_rate", c.min_learning_rate >= 0, "must be at least 0");
  at.require("min_learning_rate", c.schedule == ScheduleKind::kConstant || c.min_learning_rate <= c.learning_rate,
             "must be at most learning_rate ({})", c.learning_rate);
  at.require("warmup_steps", c.warmup_steps >= 0, "must be at least 0");
  at.require("weight_decay", c.weight_decay >= 0, "must be at least 0");
  at.require("beta1", c.beta1 >= 0 && c.beta1 < 1, "must lie in [0, 1)");
  at.require("beta2", c.beta2 >= 0 && c.beta2 < 1, "must lie in [0, 1)");
  at.require("epsilon", c.epsilon > 0, "must be greater than 0");
  at.require("clip_norm", c.clip_norm >= 0, "must be at least 0");
  at.require("eval_every", c.eval_every >= 0, "must be at least 0");
  at.require("eval_batches", c.eval_batches >= 0, "must be at least 0");
  at.require("checkpoint_every", c.checkpoint_every >= 0, "must be at least 0");
  at.require("keep_checkpoints", c.keep_checkpoints >= 1, "must be at least 1");
  at.require("sample_length", c.sample_length >= 0, "must be at least 0");
}

}  // namespace dattn
