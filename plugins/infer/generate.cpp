// The inference engine (see generate.h).
#include "plugins/infer/generate.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "core/base/error.h"
#include "core/config/attention_config.h"
#include "core/device/step_graph.h"
#include "core/nn/transformer.h"
#include "parallel/tensor_parallel.h"
#include "plugins/infer/cached_attention.h"
#include "plugins/train/model_state.h"
#include "plugins/train/text_data.h"
#include "plugins/train/together.h"

namespace dattn {
namespace {

using Clock = std::chrono::steady_clock;

const std::string& value_of(const CheckpointReader& reader, const char* key) {
  const auto found = reader.manifest().values.find(key);
  require(found != reader.manifest().values.end(), "the manifest of {} lacks the value '{}'; it was not written by dattn train",
          reader.path(), key);
  return found->second;
}

std::int64_t window_of(const CheckpointReader& reader, const ModelConfig& model) {
  return model.position == "learned" ? model.max_seq : std::stoll(value_of(reader, "seq_len"));
}

CachedAttention::Options attention_of(const CheckpointReader& reader, const ModelConfig& model) {
  const auto config = parse_config_as<AttentionConfig>(value_of(reader, "attention"), reader.path());
  CachedAttention::Options options{.layers = static_cast<int>(model.layers),
                                   .heads = model.heads,
                                   .kv_heads = model.kv_heads,
                                   .dim = model.head_dim,
                                   .scale = config.softmax_scale.value_or(0),
                                   .softcap = config.softcap.value_or(0),
                                   .alibi_slopes = config.alibi_slopes.value_or(std::vector<double>{}),
                                   .window = window_of(reader, model),
                                   .dtype = dtype_from(value_of(reader, "dtype"))};
  options.mask = to_mask(config.mask, options.window, options.window);
  for (const Region& region : compile(options.mask, options.window, options.window)) {
    const bool causal = region.hi <= 0 || region.k.end <= region.q.begin + 1;
    require(causal, "{} was trained with the mask {}, in which a token sees later ones; only causal masks can generate",
            reader.path(), options.mask.text());
  }
  return options;
}

// A model ready to continue texts.
class Engine {
 public:
  Engine(const Mesh& mesh, const CheckpointReader& reader, const GenerateOptions& options)
      : mesh_(mesh),
        options_(options),
        model_(resolve(model_from_json(reader.manifest().model, reader.path()))),
        window_(window_of(reader, model_)),
        boundary_(mesh.axis(Axis::kTensor)),
        vocabulary_(mesh.axis(Axis::kTensor)),
        attention_(mesh, attention_of(reader, model_)),
        transformer_(model_,
                     {.part = {mesh.coordinate(Axis::kTensor), mesh.shape().size(Axis::kTensor)},
                      .compute = dtype_from(value_of(reader, "dtype"))},
                     attention_, boundary_, vocabulary_),
        logits_(Tensor::uninitialized(DType::kF32, {model_.vocab})) {}

  Transformer& transformer() { return transformer_; }
  std::int64_t cached_rows() const { return attention_.cached_rows(); }
  std::int64_t graph_launches() const { return graph_.replays(); }

  // Logits [vocabulary] of the token that follows `tokens`, of which those behind the cached ones are computed now; they stand
  // until the next call.
  const TensorView& next_logits(const std::vector<std::int32_t>& tokens);

 private:
  void make_room(std::int64_t tokens);
  void compute(const TokenBatch& batch);

  const Mesh& mesh_;
  const GenerateOptions& options_;
  ModelConfig model_;
  std::int64_t window_;
  TensorBoundary boundary_;
  TensorVocabularyReduction vocabulary_;
  CachedAttention attention_;
  Transformer transformer_;
  Tensor logits_;
  StepGraph graph_;
  std::int64_t begin_ = 0;  // the token that stands at position 0
};

// A full window restarts on its last half (see generate.h).
void Engine::make_room(std::int64_t tokens) {
  if (tokens - begin_ > window_) {
    begin_ = tokens - std::max<std::int64_t>(1, window_ / 2);
    attention_.clear();
  }
  if (!options_.use_cache) attention_.clear();
}

const TensorView& Engine::next_logits(const std::vector<std::int32_t>& tokens) {
  make_room(static_cast<std::int64_t>(tokens.size()));
  const std::int64_t cached = attention_.length();
  const auto fresh = std::span(tokens).subspan(static_cast<std::size_t>(begin_ + cached));
  const NextTokens next(fresh, cached);
  if (options_.graphs && mesh_.shape().ranks() == 1 && fresh.size() == 1)
    graph_.run(attention_.next_token_key(), [&] { compute(next.batch()); });
  else
    compute(next.batch());
  return logits_;
}

// The logits behind the last of the tokens.
void Engine::compute(const TokenBatch& batch) {
  const std::array<std::int64_t, 1> last{static_cast<std::int64_t>(batch.tokens.size()) - 1};
  const Tensor part = transformer_.logits(batch, last);
  std::vector<std::int64_t> counts;
  Communicator& tensor = mesh_.axis(Axis::kTensor);
  for (int index = 0; index < tensor.size(); ++index) {
    const Interval slice = ranges_of(model_, {index, tensor.size()}).vocab;
    counts.push_back(slice.count());
    if (index == tensor.rank()) copy(part->reshape({slice.count()}), logits_->slice(0, slice.begin, slice.count()));
  }
  if (tensor.size() > 1) tensor.all_gather(logits_, counts, {.verb = "logits"});
}

std::vector<std::int32_t> encode_prompt(const Alphabet& alphabet, const std::string& prompt) {
  if (!prompt.empty()) return alphabet.encode(prompt);
  for (std::int32_t symbol = 0; symbol < alphabet.size(); ++symbol) {
    if (alphabet.decode(symbol) == '\n') return {symbol};
  }
  return {0};
}

}  // namespace

GenerateResult generate(Communicator& world, const MeshShape& shape, const std::string& path, const std::string& prompt,
                        const GenerateOptions& options, const TextSink& on_text) {
  check(options.sampling);
  require(options.max_tokens >= 0, "max_tokens is {}; use 0 or more", options.max_tokens);
  const Mesh mesh(world, shape.with_one_ring());
  std::string checkpoint;
  together(world, "finding the checkpoint", [&] {
    if (world.rank() == 0) checkpoint = find_checkpoint(path);
  });
  const CheckpointReader reader = open_checkpoint(world, world.gather_strings(checkpoint, {.verb = "checkpoint"}).front());
  const Alphabet alphabet = Alphabet::from_json(reader.manifest().alphabet, reader.path());
  std::vector<std::int32_t> tokens = encode_prompt(alphabet, prompt);
  Engine engine(mesh, reader, options);
  load_weights(world, reader, engine.transformer().parameters());
  engine.transformer().freeze();

  GenerateResult result;
  auto start = Clock::now();
  const auto lap = [&] { return std::chrono::duration<double>(Clock::now() - std::exchange(start, Clock::now())).count(); };
  for (std::int64_t index = 0; index < options.max_tokens; ++index) {
    const Tensor logits = to_device(engine.next_logits(tokens), Device{});
    std::int32_t token = 0;
    if (world.rank() == 0) {
      token = sample({logits.ptr<float>(), static_cast<std::size_t>(logits->elements())}, options.sampling,
                     static_cast<std::uint64_t>(index));
    }
    world.broadcast(std::as_writable_bytes(std::span(&token, 1)), 0, {.verb = "token"});
    tokens.push_back(token);
    result.tokens.push_back(token);
    const std::string text(1, alphabet.decode(token));
    result.text += text;
    if (world.rank() == 0 && on_text) on_text(text);
    if (index == 0) result.prefill_s = lap();
  }
  const double seconds = lap();
  if (options.max_tokens > 1 && seconds > 0) result.tokens_per_s = static_cast<double>(options.max_tokens - 1) / seconds;
  result.cached_positions = engine.cached_rows();
  result.graph_launches = engine.graph_launches();
  return result;
}

}  // namespace dattn
