// The config sections that say one attention call: mesh, shape, and the names of what may be chosen. Shared by the command's
// config (launch/run_config.h) and the C interface.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/config/attention_config.h"
#include "core/config/config.h"
#include "parallel/attention.h"
#include "parallel/layout.h"
#include "parallel/mesh.h"
#include "parallel/planner.h"

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
  static constexpr std::array<std::pair<std::string_view, DType>, 3> kAll{
      {{"fp32", DType::kF32}, {"bf16", DType::kBF16}, {"fp16", DType::kF16}}};
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
  std::optional<BiasShape> bias;
  bool sink = false;
};

inline constexpr Layout kDefaultLayout = Layout::kZigzag;

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
  v("rows", c.rows, "ranks that share out the sequence and gather queries (strategies grid, grid_gather, tree, allgather)");
  v("ring", c.ring, "ranks that share out the sequence and pass keys and values around; a number, or {inner, outer}");
  v("ranks", c.ranks, "ranks of the whole job, in place of ulysses, rows and ring: the planner shapes them");
}

template <class V>
void describe(V& v, BiasShape& c) {
  v("per_batch", c.per_batch, "a bias of its own for each batch row");
  v("per_head", c.per_head, "a bias of its own for each query head");
}

template <class V>
void describe(V& v, ShapeConfig& c) {
  v("batch", c.batch, "batch rows, shared out over mesh.data");
  v("seq", c.seq, "query positions");
  v("seq_kv", c.seq_kv, "key positions; absent = seq");
  v("heads", c.heads, "query heads");
  v("kv_heads", c.kv_heads, "key and value heads, a divisor of heads; absent = heads");
  v("dim", c.dim, "head dim of queries and keys");
  v("dim_v", c.dim_v, "head dim of values; absent = dim");
  v("bias", c.bias, "that a learned bias is added to the scores; its bytes and memory count; absent = none");
  v("sink", c.sink, "whether each head has a learned sink logit");
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

// Of a config with members attention, layout, strategy and determinism.
template <class Config>
Determinism determinism_of(const Config& config) {
  return config.determinism.value_or(current_device().is_cuda() ? Determinism::kOff : Determinism::kRepeatable);
}

template <class Config>
AttentionOptions attention_options(const Config& config, std::int64_t seq_q, std::int64_t seq_kv) {
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
          dtype,
          shape.bias,
          shape.sink};
}

// What one data coordinate computes of a call: its batch rows, their sizes and their masks.
struct DataShare {
  Interval batch;
  AttentionShape shape;
  AttentionOptions options;
};

// Of a call of these sizes; the config has a mesh too. The first coordinate has most rows. Throws Error(kBadInput), for all
// coordinates alike, where the mask does not fit the batch.
template <class Config>
DataShare data_share(const Config& config, const AttentionShape& whole, int coordinate = 0) {
  DataShare share{split_evenly(whole.batch, config.mesh.data, coordinate), whole,
                  attention_options(config, whole.seq_q, whole.seq_kv)};
  Mask& mask = share.options.mask;
  if (depends_on_row(mask.kind)) compile_batch(mask, whole.batch, whole.seq_q, whole.seq_kv);
  mask = batch_slice(mask, share.batch);
  share.shape.batch = share.batch.count();
  return share;
}

// What such a config asks of the planner for the first data coordinate, whose sizes `shape` has; it has an objective too.
// `machine` must outlive the request.
template <class Config>
PlanRequest planner_request(const Config& config, const AttentionShape& shape, const std::optional<Machine>& machine) {
  PlanRequest request;
  request.shape = shape;
  request.options = attention_options(config, shape.seq_q, shape.seq_kv);
  request.options.mask = batch_slice(request.options.mask, {0, shape.batch});
  request.mesh = config.mesh.axes();
  request.ranks = config.mesh.ranks;
  request.fixed_layout = config.layout.has_value();
  request.objective = config.objective.value_or(machine ? Objective::kTime : Objective::kBytes);
  if (machine) {
    request.machine = &*machine;
    request.memory_bytes = machine->memory_bytes;
  }
  return request;
}

}  // namespace dattn
