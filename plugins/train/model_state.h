// Saving and loading what a training run holds (weights, AdamW moments, step) as one checkpoint made by all ranks. Tensors
// go by their global names; every rank writes what it owns of some of them, and reads the slices that it holds, so a
// checkpoint can be loaded on any mesh. Weights are named "model.NAME", moments "m.NAME" and "v.NAME".
#pragma once

#include <span>
#include <string>

#include "core/nn/model_config.h"
#include "core/nn/optimizer.h"
#include "parallel/mesh.h"
#include "parallel/parameter_shares.h"
#include "plugins/train/checkpoint.h"

namespace dattn {

// Collective over the mesh's world. Parameters are dealt to the replicas, so that all ranks write about equally much; the one
// that writes a parameter takes its moments from those that have shares of it. `shares`: of which the optimizer has this
// rank's. Returns the checkpoint's folder, on every rank. Throws the same Error on every rank where any rank failed (disk
// full), after removing what was written; older checkpoints stay as they are.
std::string save_checkpoint(const Mesh& mesh, const std::string& folder, const CheckpointManifest& manifest,
                            std::span<Parameter* const> parameters, const ParameterShares& shares, AdamW& optimizer);

// Opens a checkpoint on every rank; checksums are verified by the first one. Collective; errors as above.
CheckpointReader open_checkpoint(Communicator& world, const std::string& path);

// Collective. Refuses a checkpoint of another model, naming the key or the tensor and both values.
void load_weights(Communicator& world, const CheckpointReader& reader, std::span<Parameter* const> parameters);
void load_moments(Communicator& world, const CheckpointReader& reader, AdamW& optimizer);

// The model as a manifest keeps it (JSON), and back. require_same_model names the first key that differs.
std::string model_to_json(const ModelConfig& config);
ModelConfig model_from_json(const std::string& json, const std::string& source);
void require_same_model(const ModelConfig& wanted, const CheckpointReader& reader);

// A run folder's newest whole checkpoint, or the checkpoint itself where `path` is one. Throws Error(kBadInput).
std::string find_checkpoint(const std::string& path);

}  // namespace dattn
