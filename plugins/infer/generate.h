// The inference engine: continues a text with a model of a checkpoint, on any mesh. Weights are cut over the tensor axis as
// in training, the key/value cache over ring and ulysses (cached_attention.h); data replicas compute the same. Sampling
// happens on the first rank, and its choice is broadcast, so all ranks go on with the same token.
//
// Context: the window is train.seq_len of the checkpoint for rotary positions (model.position rope, none), model.max_seq for
// learned ones. When it is full, generation restarts on the last half of it: positions count from 0 again, which both
// kinds of positions allow, and the cache is filled anew. A prompt longer than the window keeps its last half window.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "parallel/mesh.h"
#include "plugins/infer/sampler.h"

namespace dattn {

struct GenerateOptions {
  std::int64_t max_tokens = 200;
  SamplingOptions sampling;
  bool use_cache = true;  // false: every token recomputes its whole context (tests compare the two)
  bool graphs = true;     // one rank on a CUDA device: a token is one launch of a graph (core/device/step_graph.h)
};

struct GenerateResult {
  std::string text;  // without the prompt
  std::vector<std::int32_t> tokens;
  double prefill_s = 0;
  double tokens_per_s = 0;            // after the prefill
  std::int64_t cached_positions = 0;  // in this rank's cache at the end
  std::int64_t graph_launches = 0;    // tokens that were
};

// Called on the first rank with each piece of text as soon as it is chosen.
using TextSink = std::function<void(const std::string& text)>;

// `path`: a run folder (its newest whole checkpoint is taken) or a checkpoint. An empty prompt starts from a line break, or
// the first symbol where the alphabet has none. Collective over the world; errors are the same on every rank.
GenerateResult generate(Communicator& world, const MeshShape& mesh, const std::string& path, const std::string& prompt,
                        const GenerateOptions& options, const TextSink& on_text);

}  // namespace dattn
