// Everything a training run is made of, as the config states it.
#pragma once

#include <string>

#include "core/config/attention_config.h"
#include "core/nn/model_config.h"
#include "parallel/attention.h"
#include "parallel/layout.h"
#include "parallel/mesh.h"
#include "plugins/train/train_config.h"

namespace dattn {

struct TrainJob {
  MeshShape mesh;
  AttentionConfig attention;
  Layout layout = Layout::kZigzag;
  std::string strategy = "auto";
  Determinism determinism = Determinism::kRepeatable;
  DType dtype = DType::kF32;
  DataConfig data;
  ModelConfig model;  // vocab is taken from the text
  TrainConfig train;  // train.out: the run folder, or empty for runs/NAME
  std::string name = "run";
  std::string config_yaml;  // the resolved config, kept in the run folder and in checkpoints
  bool resume = false;      // continue the newest checkpoint of the run folder

  bool invariant() const { return determinism == Determinism::kInvariant; }
};

}  // namespace dattn
