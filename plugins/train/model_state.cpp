// Checkpoints made by all ranks (see model_state.h).
#include "plugins/train/model_state.h"

#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/config/config.h"
#include "plugins/train/together.h"

namespace dattn {
namespace {

// The parts that this rank writes, and the copies they point to where a slice is not contiguous.
class OwnParts {
 public:
  OwnParts(const Mesh& mesh, std::span<Parameter* const> parameters, AdamW& optimizer) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (static_cast<int>(i % static_cast<std::size_t>(mesh.replicas().size())) != mesh.replicas().rank()) continue;
      const Parameter& parameter = *parameters[i];
      const AdamW::Moments& moments = optimizer.moments()[i];
      ensure(moments.parameter == &parameter, "the optimizer's order of parameters differs at {}", parameter.name);
      add("model." + parameter.name, parameter, parameter.value);
      add("m." + parameter.name, parameter, moments.m);
      add("v." + parameter.name, parameter, moments.v);
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
                            std::span<Parameter* const> parameters, AdamW& optimizer) {
  Communicator& world = mesh.world();
  const bool first = world.rank() == 0;
  CheckpointWriter writer(folder, manifest.step);
  try {
    together(world, "making the checkpoint's folder", [&] {
      if (first) writer.begin();
    });
    const OwnParts own(mesh, parameters, optimizer);
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
    for (AdamW::Moments& moments : optimizer.moments()) {
      read_slice(reader, "m." + moments.parameter->name, *moments.parameter, moments.m);
      read_slice(reader, "v." + moments.parameter->name, *moments.parameter, moments.v);
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
