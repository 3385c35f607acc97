// dattn attention CONFIG --in x.safetensors --out y.safetensors: one sharded attention, forward and, where the file has
// dout, backward. What a user compares with their own framework.
#include "parallel/attention.h"

#include <chrono>
#include <map>
#include <memory>
#include <utility>

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/tensor/safetensors.h"
#include "launch/commands/commands.h"
#include "launch/commands/gather.h"
#include "launch/commands/planning.h"
#include "parallel/strategy.h"

namespace dattn {
namespace {

struct Inputs {
  TensorView q, k, v, dout, bias, sink;  // whole tensors, on the mapped file
  bool has_dout = false;
  AttentionShape shape;
};

// A tensor of the file as [B, S, H, X].
TensorView read_tensor(const SafetensorsFile& file, std::string_view name, TensorFormat format) {
  require(file.has(name), "{}: no tensor '{}'; it must hold q, k and v, and may hold dout", file.path(), name);
  static const std::map<TensorFormat, std::string_view> kAxes{{TensorFormat::kBSHD, "[batch, seq, heads, dim]"},
                                                              {TensorFormat::kSBHD, "[seq, batch, heads, dim]"},
                                                              {TensorFormat::kBHSD, "[batch, heads, seq, dim]"},
                                                              {TensorFormat::kTHD, "[tokens, heads, dim]"}};
  const TensorView view = file.view(name);
  require(view.axes() == (format == TensorFormat::kTHD ? 3 : 4),
          "{}: tensor '{}' has shape {}; expected the axes {} of tensor_format", file.path(), name, view.shape.text(),
          kAxes.at(format));
  require(view.dtype != DType::kI32, "{}: tensor '{}' has dtype int32; use fp32, bf16 or fp16", file.path(), name);
  return from_format(view, format);
}

Inputs read_inputs(const SafetensorsFile& file, DType dtype, TensorFormat format) {
  Inputs in;
  in.q = read_tensor(file, "q", format);
  in.k = read_tensor(file, "k", format);
  in.v = read_tensor(file, "v", format);
  in.shape = {in.q.size(0), in.q.size(1), in.k.size(1), in.q.size(2), in.k.size(2), in.q.size(3), in.v.size(3), dtype};
  const AttentionShape& s = in.shape;
  const auto check = [&](const char* name, const TensorView& tensor, const Shape& expected) {
    require(tensor.shape == expected,
            "{}: tensor '{}' has shape {}, but by q {}, k {} and v {} it must be {} (all as [batch, seq, heads, dim])",
            file.path(), name, tensor.shape.text(), in.q.shape.text(), in.k.shape.text(), in.v.shape.text(), expected.text());
  };
  check("k", in.k, {s.batch, s.seq_kv, s.kv_heads, s.dim_qk});
  check("v", in.v, {s.batch, s.seq_kv, s.kv_heads, s.dim_v});
  in.has_dout = file.has("dout");
  if (in.has_dout) {
    in.dout = read_tensor(file, "dout", format);
    check("dout", in.dout, {s.batch, s.seq_q, s.heads, s.dim_v});
  }
  if (file.has("bias")) {
    in.bias = read_tensor(file, "bias", TensorFormat::kBHSD);  // [B or 1, H or 1, S, Skv] in any format
    in.shape.bias = BiasShape{in.bias.size(0) != 1, in.bias.size(2) != 1};
    check("bias", in.bias, {in.bias.size(0) == 1 ? 1 : s.batch, s.seq_q, in.bias.size(2) == 1 ? 1 : s.heads, s.seq_kv});
  }
  if (file.has("sink")) {
    in.sink = file.view("sink");
    in.shape.sink = true;
    require(in.sink.shape == Shape({s.heads}) && in.sink.dtype == DType::kF32,
            "{}: tensor 'sink' is {} {}; it must be fp32 [{}], one logit for each query head", file.path(),
            name_of(in.sink.dtype), in.sink.shape.text(), s.heads);
  }
  return in;
}

// What every data coordinate computes; layout balanced follows the masks of its own batch rows.
Problems problems_of(const RunConfig& config, const AttentionShape& whole) {
  Problems problems;
  for (int coordinate = 0; coordinate < config.mesh.data; ++coordinate) {
    const DataShare share = data_share(config, whole, coordinate);
    problems.push_back(make_problem(config.mesh.shape(), share.shape, share.options));
  }
  return problems;
}

void run_attention(const RunConfig& unplanned, Communicator& world, const std::string& in_path, const std::string& out_path,
                   bool json) {
  const auto start = std::chrono::steady_clock::now();
  const SafetensorsFile file(in_path);
  const Inputs in = read_inputs(file, unplanned.dtype, unplanned.tensor_format);
  const RunConfig config = resolve_mesh(unplanned, data_share(unplanned, in.shape).shape);
  const Mesh mesh(world, config.mesh.shape());
  const auto [batch, shape, options] = data_share(config, in.shape, mesh.coordinate(Axis::kData));
  ShardedAttention attention(mesh, shape, options);

  const Positions &q_rows = attention.q_positions(), &kv_rows = attention.kv_positions();
  const HeadRange heads = attention.heads();
  const Tensor q = take_shard(in.q, {batch, q_rows, heads.q}, config.dtype),
               k = take_shard(in.k, {batch, kv_rows, heads.kv}, config.dtype);
  const Tensor v = take_shard(in.v, {batch, kv_rows, heads.kv}, config.dtype);
  AttentionCall call{.batch_begin = batch.begin};
  Tensor bias, sink;
  if (shape.bias) {
    bias = take_shard(in.bias,
                      {shape.bias->per_batch ? batch : Interval{0, 1}, q_rows, shape.bias->per_head ? heads.q : Interval{0, 1}},
                      config.dtype);
    call.bias = bias;
  }
  if (shape.sink) {
    sink = to_device(in.sink.slice(0, heads.q.begin, heads.q.count()), current_device());
    call.sink = sink;
  }
  const AttentionResult result = attention.forward(q, k, v, call);

  const Plan& forward = attention.forward_plan();
  Gatherer gatherer(mesh, world.rank() == 0 ? problems_of(config, in.shape) : Problems{}, in.shape.batch, config.tensor_format);
  const AttentionShape& whole = in.shape;
  const DType sums = accumulate_type(config.dtype);
  gatherer.add("out", result.out, {whole.batch, whole.seq_q, whole.heads, whole.dim_v}, Side::kQuery);
  gatherer.add_by_head("lse", statistics_as_rows(result.lse), {whole.batch, whole.seq_q, whole.heads, 1});
  if (in.has_dout) {
    const Tensor dout = take_shard(in.dout, {batch, q_rows, heads.q}, config.dtype);
    const AttentionGradients gradients = attention.backward(q, k, v, result, dout, call);
    gatherer.add("dq", gradients.dq, {whole.batch, whole.seq_q, whole.heads, whole.dim_qk}, Side::kQuery);
    gatherer.add("dk", gradients.dk, {whole.batch, whole.seq_kv, whole.kv_heads, whole.dim_qk}, Side::kKey);
    gatherer.add("dv", gradients.dv, {whole.batch, whole.seq_kv, whole.kv_heads, whole.dim_v}, Side::kKey);
    if (shape.bias) gatherer.add_by_head("dbias", gradients.dbias, in.bias.shape);
    if (shape.sink) gatherer.add_heads("dsink", gradients.dsink, whole.heads);
  }
  gatherer.write(out_path);
  if (world.rank() != 0) return;
  Json done{{"event", "done"},
            {"strategy", forward.strategy},
            {"layout", name_of(forward.problem->layout)},
            {"mask", forward.problem->mask_text},
            {"dtype", name_of(config.dtype)},
            {"accumulator", name_of(sums)}};
  done["mesh"] = to_json(mesh.shape());
  done.update(plan_costs(forward, attention.backward_plan()));
  done["wall_s"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  done["out"] = out_path;
  print_line(json ? done.dump() : out_path);
}

}  // namespace

Command add_attention(CLI::App& app) {
  CLI::App* command = app.add_subcommand("attention", "one sharded attention, forward and backward, on tensors of a file");
  struct Options {
    CommonOptions common;
    std::string config, in, out;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("config", options->config, "YAML file with attention, mesh, layout, strategy, dtype")->required();
  command->add_option("--in", options->in, "safetensors file with q, k, v and, for gradients, dout")->required();
  command->add_option("--out", options->out, "safetensors file to write: out, lse [B,H,S] (thd: [H,T]), and dq, dk, dv")
      ->required();
  options->common.declare(*command, true);
  options->common.declare_trace(*command);
  return [options] {
    const auto load = [&] { return load_run_config(options->config, options->common); };
    return run_with_config(options->common, load, [&](const RunConfig& config, Communicator& world) {
      run_attention(config, world, options->in, options->out, options->common.json);
    });
  };
}

}  // namespace dattn
