// The whole config of a run, as the command reads it: one struct per section. configs/SCHEMA.md is made from this.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "core/nn/model_config.h"
#include "launch/devices.h"
#include "parallel/call_config.h"
#include "plugins/train/train_config.h"

namespace dattn {

// Axes of the tensors in a file: batch, sequence, heads, dim; thd: the tokens of all documents behind each other, one batch
// row.
enum class TensorFormat { kBSHD, kSBHD, kBHSD, kTHD };

template <>
struct ConfigNames<TensorFormat> {
  static constexpr std::array<std::pair<std::string_view, TensorFormat>, 4> kAll{{{"bshd", TensorFormat::kBSHD},
                                                                                  {"sbhd", TensorFormat::kSBHD},
                                                                                  {"bhsd", TensorFormat::kBHSD},
                                                                                  {"thd", TensorFormat::kTHD}}};
};

struct CommConfig {
  double timeout_s = 60;
  Transfers transfers = Transfers::kAuto;
  NcclTuning nccl;
};

struct RunConfig {
  AttentionConfig attention;
  MeshConfig mesh;
  std::optional<Layout> layout;
  std::string strategy = "auto";
  std::optional<Objective> objective;
  std::string machine;
  DType dtype = DType::kF32;
  bool tf32 = false;
  std::optional<Determinism> determinism;
  TensorFormat tensor_format = TensorFormat::kBSHD;
  DeviceChoice device = DeviceChoice::kAuto;
  int ranks_per_device = 1;
  int threads = 0;
  CommConfig comm;
  DataConfig data;
  ModelConfig model;
  TrainConfig train;
  std::optional<ShapeConfig> shape;
};

template <class V>
void describe(V& v, NcclTuning& c) {
  v("max_ctas", c.max_ctas, "thread blocks that a group's transfers may take from computation; 0 = NCCL's choice");
  v("zero_cta", c.zero_cta, "gathers through symmetric memory take none: copy engines move them (NCCL 2.28, over NVLink)");
  v("symmetric_bytes", c.symmetric_bytes, "of each group's buffer in symmetric memory, for gathers (NCCL 2.27); 0 = none");
  v("register_buffers", c.register_buffers, "registers the memory of transfers with NCCL");
}

template <class V>
void describe(V& v, CommConfig& c) {
  v("timeout_s", c.timeout_s, "seconds without an answer after which a peer counts as lost");
  v("transfers", c.transfers, "how device tensors travel: nccl, staged (through host memory), or auto: nccl where it can");
  v("nccl", c.nccl, "how NCCL moves them");
}

template <class V>
void describe(V& v, RunConfig& c) {
  v("attention", c.attention, "the mask and the terms of the scores");
  v("mesh", c.mesh, "ranks along each axis; the product equals the ranks of the job");
  v("layout", c.layout, "which positions each part of the sequence holds; absent = zigzag, or the planner's");
  v("strategy", c.strategy, "how keys and values travel: a file of parallel/strategies, or auto: the planner's choice");
  v("objective", c.objective,
    "what the planner makes least: bytes received, or time on the machine; absent = time where a machine is named");
  v("machine", c.machine, "machine file for the planner (configs/machines); relative to this file");
  v("dtype", c.dtype, "storage type; sums are kept in fp32");
  v("tf32", c.tf32,
    "CUDA devices may round the factors of fp32 products to TF32: of the layers, and of attention where dims of q are at most "
    "192, of v 128, and rows aligned to 16 bytes");
  v("determinism", c.determinism,
    "off; repeatable: same mesh, same bits; absent = repeatable on the cpu, off on CUDA devices; invariant: the same bits on "
    "every mesh (training: of data and sequence ranks in "
    "layout zigzag)");
  v("tensor_format", c.tensor_format,
    "axes of q, k, v, dout, out, dq, dk, dv in the files of `dattn attention`; thd: [tokens, heads, dim], documents packed");
  v("device", c.device, "where ranks compute: auto takes CUDA devices where each host has enough for its ranks");
  v("ranks_per_device", c.ranks_per_device, "ranks of a host that share a CUDA device");
  v("threads", c.threads, "threads per rank; 0 = cores / ranks on this machine");
  v("comm", c.comm, "communication");
  v("data", c.data, "the training text");
  v("model", c.model, "the transformer");
  v("train", c.train, "the training loop");
  v("shape", c.shape, "sizes of one attention call, for plan and bench");
}

inline void check(const NcclTuning& c, const ConfigCheck& at) {
  at.require("max_ctas", c.max_ctas >= 0, "must be at least 0");
  at.require("symmetric_bytes", c.symmetric_bytes >= 0, "must be at least 0");
  at.require("zero_cta", !c.zero_cta || c.symmetric_bytes > 0, "moves what is in symmetric memory: give symmetric_bytes");
}

inline void check(const CommConfig& c, const ConfigCheck& at) {
  at.require("timeout_s", c.timeout_s > 0, "must be greater than 0");
}

inline void check(const RunConfig& c, const ConfigCheck& at) {
  at.require("threads", c.threads >= 0, "must be at least 0");
  at.require("ranks_per_device", c.ranks_per_device >= 1, "must be at least 1");
  at.require("objective", c.objective != Objective::kTime || !c.machine.empty(), "needs the machine: give machine: FILE");
}

// The text of configs/SCHEMA.md.
inline std::string run_config_schema() {
  return schema_page(
      "Config keys",
      "Made from the structs by the tests (`DATTN_UPDATE=1`, `Schema.*`); do not edit. Every key may also be set on "
      "the command line: `--set train.steps=10`. Unknown and duplicate keys, anchors, aliases and tags are refused.",
      schema_of<RunConfig>());
}

}  // namespace dattn
