// The whole config of a run, as the command reads it: one struct per section. configs/SCHEMA.md is made from this.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/config/attention_config.h"
#include "core/config/config.h"
#include "core/nn/model_config.h"
#include "launch/devices.h"
#include "parallel/attention.h"
#include "parallel/layout.h"
#include "parallel/mesh.h"
#include "parallel/planner.h"
#include "plugins/train/train_config.h"

namespace dattn {

template <>
struct ConfigNames<Layout> {
  static constexpr std::array<std::pair<std::string_view, Layout>, 4> kAll{{{"contiguous", Layout::kContiguous},
                                                                            {"zigzag", Layout::kZigzag},
                                                                            {"striped", Layout::kStriped},
                                                                            {"balanced", Layout::kBalanced}}};
};

template <>
struct ConfigNames<DType> {
  static constexpr std::array<std::pair<std::string_view, DType>, 2> kAll{{{"fp32", DType::kF32}, {"bf16", DType::kBF16}}};
};

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

template <>
struct ConfigNames<Objective> {
  static constexpr std::array<std::pair<std::string_view, Objective>, 2> kAll{
      {{"bytes", Objective::kBytes}, {"time", Objective::kTime}}};
};

template <>
struct ConfigNames<Determinism> {
  static constexpr std::array<std::pair<std::string_view, Determinism>, 3> kAll{
      {{"off", Determinism::kOff}, {"repeatable", Determinism::kRepeatable}, {"invariant", Determinism::kInvariant}}};
};

// `ring: n`, or `ring: {inner: a, outer: b}`: a ring of b rings of a ranks.
struct RingConfig {
  int inner = 1;
  int outer = 1;
};

struct MeshConfig {
  int data = 1;
  int tensor = 1;
  int ulysses = 1;
  int rows = 1;
  RingConfig ring;
  std::optional<int> ranks;

  // For meshes that are given by their axes, or have been planned.
  MeshShape shape() const {
    ensure(!ranks, "the mesh of {} ranks has not been planned", ranks.value_or(0));
    return axes();
  }
  int job_ranks() const { return ranks.value_or(axes().ranks()); }
  MeshShape axes() const {
    MeshShape mesh;
    mesh.set(Axis::kData, data);
    mesh.set(Axis::kRingOuter, ring.outer);
    mesh.set(Axis::kRing, ring.inner);
    mesh.set(Axis::kRows, rows);
    mesh.set(Axis::kUlysses, ulysses);
    mesh.set(Axis::kTensor, tensor);
    return mesh;
  }
};

// Sizes of one attention call, for `plan` and `bench`, which have no tensors to take them from.
struct ShapeConfig {
  std::int64_t batch = 1;
  std::int64_t seq = 1024;
  std::optional<std::int64_t> seq_kv;
  std::int64_t heads = 8;
  std::optional<std::int64_t> kv_heads;
  std::int64_t dim = 64;
  std::optional<std::int64_t> dim_v;
};

struct CommConfig {
  double timeout_s = 60;
  Transfers transfers = Transfers::kAuto;
};

inline constexpr Layout kDefaultLayout = Layout::kZigzag;

struct RunConfig {
  AttentionConfig attention;
  MeshConfig mesh;
  std::optional<Layout> layout;
  std::string strategy = "auto";
  std::optional<Objective> objective;
  std::string machine;
  DType dtype = DType::kF32;
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
void describe(V& v, RingConfig& c) {
  v("inner", c.inner, "ranks of each inner ring: neighbours, inside a node");
  v("outer", c.outer, "inner rings: between nodes");
}

inline void read_value(const ConfigNode& node, const std::string& path, RingConfig& value) {
  if (node.kind == ConfigNode::Kind::kMap) return read_value<RingConfig>(node, path, value);
  value.outer = 1;
  read_value(node, path, value.inner);
}

inline ConfigNode to_node(const RingConfig& value) {
  return value.outer == 1 ? to_node(value.inner) : to_node<RingConfig>(value);
}

template <class V>
void describe(V& v, MeshConfig& c) {
  v("data", c.data, "ranks that share out the batch");
  v("tensor", c.tensor, "ranks that share out heads, hidden units and vocabulary");
  v("ulysses", c.ulysses, "ranks that share out the sequence and, inside attention, the heads");
  v("rows", c.rows, "ranks that share out the sequence and gather queries (strategies grid, tree, allgather)");
  v("ring", c.ring, "ranks that share out the sequence and pass keys and values around; a number, or {inner, outer}");
  v("ranks", c.ranks, "ranks of the whole job, in place of ulysses, rows and ring: the planner shapes them");
}

template <class V>
void describe(V& v, ShapeConfig& c) {
  v("batch", c.batch, "batch rows");
  v("seq", c.seq, "query positions");
  v("seq_kv", c.seq_kv, "key positions; absent = seq");
  v("heads", c.heads, "query heads");
  v("kv_heads", c.kv_heads, "key and value heads, a divisor of heads; absent = heads");
  v("dim", c.dim, "head dim of queries and keys");
  v("dim_v", c.dim_v, "head dim of values; absent = dim");
}

template <class V>
void describe(V& v, CommConfig& c) {
  v("timeout_s", c.timeout_s, "seconds without an answer after which a peer counts as lost");
  v("transfers", c.transfers, "how device tensors travel: nccl, staged (through host memory), or auto: nccl where it can");
}

template <class V>
void describe(V& v, RunConfig& c) {
  v("attention", c.attention, "the mask and the terms of the scores");
  v("mesh", c.mesh, "ranks along each axis; the product equals the ranks of the job");
  v("layout", c.layout, "which positions each part of the sequence holds; absent = zigzag, or the planner's");
  v("strategy", c.strategy, "how keys and values travel: auto, or a file of parallel/strategies");
  v("objective", c.objective,
    "what the planner makes least: bytes received, or time on the machine; absent = time where a machine is named, but "
    "strategy auto on a mesh given by its axes is then not planned");
  v("machine", c.machine, "machine file for the planner (configs/machines); relative to this file");
  v("dtype", c.dtype, "storage type; sums are kept in fp32");
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

inline void check(const MeshConfig& c, const ConfigCheck& at) {
  std::int64_t product = 1;
  const auto check_axis = [&](std::string_view key, int size) {
    at.require(key, size >= 1 && size <= kMaxRanks, "must lie in [1, {}]", kMaxRanks);
    product *= size;
    at.require(key, product <= kMaxRanks, "makes more than {} ranks with the axes before it", kMaxRanks);
  };
  check_axis("data", c.data);
  check_axis("tensor", c.tensor);
  check_axis("ulysses", c.ulysses);
  check_axis("rows", c.rows);
  check_axis("ring", c.ring.inner);
  check_axis("ring", c.ring.outer);
  if (!c.ranks) return;
  at.require("ranks", c.ulysses == 1 && c.rows == 1 && c.ring.inner == 1 && c.ring.outer == 1,
             "stands in place of ulysses, rows and ring; give either it or those");
  at.require("ranks", *c.ranks >= 1 && *c.ranks <= kMaxRanks && *c.ranks % (c.data * c.tensor) == 0,
             "must be a multiple of data {} x tensor {}, at most {}", c.data, c.tensor, kMaxRanks);
}

inline void check(const ShapeConfig& c, const ConfigCheck& at) {
  at.require("batch", c.batch >= 1, "must be at least 1");
  at.require("seq", c.seq >= 0 && c.seq <= kMaxPosition, "must lie in [0, {}]", kMaxPosition);
  at.require("heads", c.heads >= 1, "must be at least 1");
  at.require("dim", c.dim >= 1, "must be at least 1");
  const std::int64_t kv_heads = c.kv_heads.value_or(c.heads);
  at.require("kv_heads", kv_heads >= 1 && c.heads % kv_heads == 0, "must divide heads ({})", c.heads);
}

inline void check(const CommConfig& c, const ConfigCheck& at) {
  at.require("timeout_s", c.timeout_s > 0, "must be greater than 0");
}

inline void check(const RunConfig& c, const ConfigCheck& at) {
  at.require("threads", c.threads >= 0, "must be at least 0");
  at.require("ranks_per_device", c.ranks_per_device >= 1, "must be at least 1");
  at.require("objective", c.objective != Objective::kTime || !c.machine.empty(), "needs the machine: give machine: FILE");
}

inline Determinism determinism_of(const RunConfig& config) {
  return config.determinism.value_or(current_device().is_cuda() ? Determinism::kOff : Determinism::kRepeatable);
}

inline AttentionOptions attention_options(const RunConfig& config, std::int64_t seq_q, std::int64_t seq_kv) {
  const AttentionConfig& attention = config.attention;
  return {.mask = to_mask(attention.mask, seq_q, seq_kv),
          .softmax_scale = attention.softmax_scale,
          .layout = config.layout.value_or(kDefaultLayout),
          .strategy = config.strategy,
          .determinism = determinism_of(config),
          .softcap = attention.softcap.value_or(0),
          .alibi_slopes = attention.alibi_slopes.value_or(std::vector<double>{}),
          .dropout = attention.dropout.p,
          .dropout_seed = static_cast<std::uint64_t>(attention.dropout.seed)};
}

inline AttentionShape shape_of(const ShapeConfig& shape, DType dtype) {
  return {shape.batch,
          shape.seq,
          shape.seq_kv.value_or(shape.seq),
          shape.heads,
          shape.kv_heads.value_or(shape.heads),
          shape.dim,
          shape.dim_v.value_or(shape.dim),
          dtype};
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
