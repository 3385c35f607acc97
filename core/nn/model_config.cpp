#include "core/nn/model_config.h"

#include <algorithm>
#include <initializer_list>

#include "core/base/error.h"

namespace dattn {
namespace {

void require_word(std::string_view key, std::string_view value, std::initializer_list<std::string_view> known) {
  std::string list;
  for (const std::string_view word : known) list += (list.empty() ? "" : ", ") + std::string(word);
  require(std::find(known.begin(), known.end(), value) != known.end(), "model.{} is '{}'; it is one of {}", key, value, list);
}

void require_positive(std::string_view key, std::int64_t value) {
  require(value >= 1, "model.{} is {}; it must be at least 1", key, value);
}

void require_default_or_positive(std::string_view key, std::int64_t value) {
  require(value >= 0, "model.{} is {}; it must be at least 1, or 0 for the default", key, value);
}

}  // namespace

ModelConfig model_style(std::string_view name) {
  require_word("style", name, {"gpt2", "llama"});
  ModelConfig config;
  if (name == "llama") {
    config.norm = "rmsnorm";
    config.position = "rope";
    config.activation = "swiglu";
    config.bias = false;
    config.tied = false;
  }
  return config;
}

void validate(const ModelConfig& config) {
  require_positive("layers", config.layers);
  require_positive("dim", config.dim);
  require_positive("heads", config.heads);
  require_positive("vocab", config.vocab);
  require_positive("max_seq", config.max_seq);
  require_default_or_positive("kv_heads", config.kv_heads);
  require_default_or_positive("head_dim", config.head_dim);
  require_default_or_positive("hidden", config.hidden);
  require_word("norm", config.norm, {"layernorm", "rmsnorm"});
  require_word("position", config.position, {"learned", "rope", "none"});
  require_word("activation", config.activation, {"gelu", "swiglu"});
  require(config.kv_heads == 0 || config.heads % config.kv_heads == 0,
          "model.heads {} is no multiple of model.kv_heads {}; use as many query heads for every KV head", config.heads,
          config.kv_heads);
  require(config.head_dim != 0 || config.dim % config.heads == 0,
          "model.dim {} is no multiple of model.heads {}; set model.head_dim, or another number of heads", config.dim,
          config.heads);
  const std::int64_t head_dim = config.head_dim != 0 ? config.head_dim : config.dim / config.heads;
  require(config.position != "rope" || head_dim % 2 == 0,
          "model.position rope turns pairs of features, and model.head_dim is {}; make it even", head_dim);
  require(config.dropout >= 0.0 && config.dropout < 1.0, "model.dropout is {}; it is a probability in [0, 1)", config.dropout);
  require(config.rope_base > 1.0, "model.rope_base is {}; it must be above 1", config.rope_base);
  require(config.norm_epsilon > 0.0, "model.norm_epsilon is {}; it must be above 0", config.norm_epsilon);
}

ModelConfig resolve(ModelConfig config) {
  validate(config);
  if (config.kv_heads == 0) config.kv_heads = config.heads;
  if (config.head_dim == 0) config.head_dim = config.dim / config.heads;
  if (config.hidden == 0) {
    const std::int64_t two_thirds = (8 * config.dim + 2) / 3;
    config.hidden = config.activation == "swiglu" ? (two_thirds + 31) / 32 * 32 : 4 * config.dim;
  }
  return config;
}

std::int64_t count_parameters(const ModelConfig& config) {
  const ModelConfig c = resolve(config);
  const std::int64_t bias = c.bias ? 1 : 0, norm = c.dim * (c.norm == "layernorm" ? 2 : 1);
  const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, up = c.hidden * (c.activation == "swiglu" ? 2 : 1);
  const std::int64_t attention = (q + 2 * kv) * (c.dim + bias) + (q + bias) * c.dim;
  const std::int64_t mlp = up * (c.dim + bias) + (c.hidden + bias) * c.dim;
  const std::int64_t embedding = c.dim * (c.vocab * (c.tied ? 1 : 2) + (c.position == "learned" ? c.max_seq : 0));
  return embedding + c.layers * (attention + mlp + 2 * norm) + norm;
}

}  // namespace dattn
