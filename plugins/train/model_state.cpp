// Checkpoints made by all ranks (see model_state.h).
#include "plugins/train/model_state.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/config/config.h"
#include "plugins/train/together.h"

namespace dattn {
namespace {

using Moment = Tensor AdamW::Moments::*;

// Those of one parameter, which stand side by side.
std::span<const ParameterRun> runs_in(std::span<const ParameterRun> runs, const Parameter* parameter) {
  const auto is_of = [&](const ParameterRun& run) { return run.parameter == parameter; };
  const auto begin = std::find_if(runs.begin(), runs.end(), is_of);
  return {begin, std::find_if_not(begin, runs.end(), is_of)};
}

// The optimizer's moments, of which each replica has its share.
class SharedMoments {
 public:
  SharedMoments(Communicator& replicas, const ParameterShares& shares, AdamW& optimizer)
      : replicas_(replicas), optimizer_(optimizer), me_(shares.parts() == 1 ? 0 : replicas.rank()) {
    for (int part = 0; part < shares.parts(); ++part) runs_.push_back(shares.of(part));
  }

  // A moment of the parameter, whole, on replica `writer`; undefined elsewhere. Collective, unless every replica has all.
  Tensor gather(const Parameter& parameter, Moment moment, int writer) const {
    const bool writes = replicas_.rank() == writer;
    std::vector<Tensor> messages(runs_.size());  // the runs of each replica, end to end
    std::vector<SendPart> sends;
    std::vector<RecvPart> receives;
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      const bool mine = std::cmp_equal(r, me_);
      std::int64_t count = 0;
      for (const ParameterRun& run : runs_in(runs_[r], &parameter)) count += run.elements.count();
      if (count == 0 || !(writes || mine)) continue;
      Tensor& message = messages[r] = Tensor::uninitialized(DType::kF32, {count});
      const auto bytes = static_cast<std::size_t>(message->bytes());
      if (mine)
        pack(parameter, moment, message);
      else
        receives.push_back({static_cast<int>(r), message->data, bytes, message->device});
      if (mine && !writes && runs_.size() > 1) sends.push_back({writer, message->data, bytes, message->device});
    }
    replicas_.exchange(sends, receives, {.verb = "checkpoint"});
    if (!writes) return {};
    Tensor whole = Tensor::uninitialized(DType::kF32, parameter.value->shape);
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      for_each_place(runs_in(runs_[r], &parameter), messages[r],
                     [&](const ParameterRun& run, const TensorView& place) { copy(place, run.of(whole)); });
    }
    return whole;
  }

 private:
  void pack(const Parameter& parameter, Moment moment, const TensorView& message) const {
    std::int64_t begin = 0;
    for (const AdamW::Moments& moments : optimizer_.moments()) {
      if (moments.run.parameter != &parameter) continue;
      copy(moments.*moment, message.slice(0, begin, moments.run.elements.count()));
      begin += moments.run.elements.count();
    }
  }

  Communicator& replicas_;
  AdamW& optimizer_;
  int me_;
  std::vector<std::vector<ParameterRun>> runs_;  // by replica
};

// The parts that this rank writes, and the copies they point to. Making it is collective.
class OwnParts {
 public:
  OwnParts(Communicator& replicas, std::span<Parameter* const> parameters, const SharedMoments& moments) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const Parameter& parameter = *parameters[i];
      const int writer = static_cast<int>(i % static_cast<std::size_t>(replicas.size()));
      Tensor m = moments.gather(parameter, &AdamW::Moments::m, writer),
             v = moments.gather(parameter, &AdamW::Moments::v, writer);
      if (replicas.rank() != writer) continue;
      add("model." + parameter.name, parameter, parameter.value);
      add("m." + parameter.name, parameter, copies_.emplace_back(std::move(m)));
      add("v." + parameter.name, parameter, copies_.emplace_back(std::move(v)));
    }
  }
  std::span<const TensorPart> parts() const { return parts_; }

 private:
  void add(std::string name, const Parameter& parameter, const TensorView& local) {
    if (parameter.owned.count() == 0) return;
    TensorView view = owned_of(parameter, local);
    if (!view.contiguous()) view = copies_.emplace_back(to_dtype(view, DType::kF32));
    parts_.push_back({std::move(name), view, parameter.global_shape, parameter.cut_axis, parameter.owned.begin});
  }

  std::vector<TensorPart> parts_;
  std::vector<Tensor> copies_;
};

std::vector<CheckpointReader::Expected> expected_tensors(const char* prefix, std::span<Parameter* const> parameters) {
  std::vector<CheckpointReader::Expected> expected;
  for (const Parameter* parameter : parameters) expected.push_back({prefix + parameter->name, parameter->global_shape});
  return expected;
}

void read_slice(const CheckpointReader& reader, const std::string& name, const Parameter& parameter, const TensorView& to) {
  if (parameter.held.count() > 0) reader.read_rows(name, parameter.cut_axis, parameter.held.begin, to);
}

}  // namespace

std::string save_checkpoint(const Mesh& mesh, const std::string& folder, const CheckpointManifest& manifest,
                            std::span<Parameter* const> parameters, const ParameterShares& shares, AdamW& optimizer) {
  Communicator& world = mesh.world();
  const bool first = world.rank() == 0;
  CheckpointWriter writer(folder, manifest.step);
  try {
    together(world, "making the checkpoint's folder", [&] {
      if (first) writer.begin();
    });
    const OwnParts own(mesh.replicas(), parameters, SharedMoments(mesh.replicas(), shares, optimizer));
    std::string record;  // stays empty on a rank that owns nothing
    together(world, "writing the checkpoint", [&] {
      if (!own.parts().empty()) record = writer.write_shard(world.rank(), own.parts()).to_json();
    });
    const std::vector<std::string> records = world.gather_strings(record, {.verb = "checkpoint"});
    std::string path;
    together(world, "completing the checkpoint", [&] {
      if (!first) return;
      CheckpointManifest whole = manifest;
      for (const std::string& text : records) {
        if (!text.empty()) whole.shards.push_back(ShardRecord::from_json(text));
      }
      path = writer.finish(whole);
    });
    return world.gather_strings(path, {.verb = "checkpoint"}).front();
  } catch (...) {
    if (first) writer.abandon();
    throw;
  }
}

CheckpointReader open_checkpoint(Communicator& world, const std::string& path) {
  std::optional<CheckpointReader> reader;
  together(world, "opening the checkpoint", [&] {
    if (world.rank() == 0) reader.emplace(path);
  });
  together(world, "opening the checkpoint", [&] {
    if (world.rank() != 0) reader.emplace(path, CheckpointReader::Verify::kSizes);
  });
  return std::move(*reader);
}

void load_weights(Communicator& world, const CheckpointReader& reader, std::span<Parameter* const> parameters) {
  together(world, "loading weights", [&] {
    reader.require_model(expected_tensors("model.", parameters), "model.");
    for (Parameter* parameter : parameters) read_slice(reader, "model." + parameter->name, *parameter, parameter->value);
  });
}

void load_moments(Communicator& world, const CheckpointReader& reader, AdamW& optimizer) {
  together(world, "loading the optimizer's state", [&] {
    Tensor m, v;  // of `last`, whole
    const Parameter* last = nullptr;
    for (AdamW::Moments& moments : optimizer.moments()) {
      const Parameter* parameter = moments.run.parameter;
      if (parameter != std::exchange(last, parameter)) {
        m = Tensor::uninitialized(DType::kF32, parameter->value->shape);
        v = Tensor::uninitialized(DType::kF32, parameter->value->shape);
        read_slice(reader, "m." + parameter->name, *parameter, m);
        read_slice(reader, "v." + parameter->name, *parameter, v);
      }
      copy(moments.run.of(m), moments.m);
      copy(moments.run.of(v), moments.v);
    }
  });
  optimizer.set_steps_done(reader.manifest().step);
}

std::string model_to_json(const ModelConfig& config) { return to_json(to_node(config)); }

ModelConfig model_from_json(const std::string& json, const std::string& source) {
  return read_config<ModelConfig>(parse_config(json, source));
}

void require_same_model(const ModelConfig& wanted, const CheckpointReader& reader) {
  const ConfigNode ours = to_node(wanted);
  const ConfigNode theirs = to_node(model_from_json(reader.manifest().model, reader.path()));
  for (const ConfigEntry& entry : ours.entries) {
    const ConfigNode* other = theirs.find(entry.key);
    const std::string mine = to_json(entry.value), its = other ? to_json(*other) : "absent";
    require(mine == its,
            "{} is a checkpoint of another model: model.{} is {} there and {} in the config; change the config or {}",
            reader.path(), entry.key, its, mine, "train afresh without --resume");
  }
}

std::string find_checkpoint(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::exists(fs::path(path) / "manifest.json")) return path;
  const fs::path folder = fs::path(path) / "checkpoints";
  require(fs::is_directory(folder),
          "{} is neither a run folder nor a checkpoint: it has no checkpoints folder and no manifest.json", path);
  const std::optional<std::string> latest = latest_checkpoint(folder.string());
  require(latest.has_value(), "{} holds no whole checkpoint; train with train.checkpoint_every set, or to the end",
          folder.string());
  return *latest;
}

}  // namespace dattn
