// What a transformer is made of, as plain values: sizes, and which of a few known parts stand at each place.
// describe() names every member once; readers, printers and the schema page are visitors of it.
//
//   style   norm       position  activation  bias   tied    source
//   gpt2    layernorm  learned   gelu        true   true    Radford et al., "Language models are unsupervised multitask
//                                                           learners", 2019
//   llama   rmsnorm    rope      swiglu      false  false   Touvron et al., "LLaMA", 2023
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace dattn {

struct ModelConfig {
  std::int64_t layers = 4;
  std::int64_t dim = 192;
  std::int64_t heads = 6;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t hidden = 0;
  std::int64_t vocab = 256;
  std::int64_t max_seq = 1024;
  std::string norm = "layernorm";
  std::string position = "learned";
  std::string activation = "gelu";
  bool bias = true;
  bool tied = true;
  double dropout = 0.0;
  double rope_base = 10000.0;
  double norm_epsilon = 1e-5;

  bool operator==(const ModelConfig&) const = default;
};

// Calls visit(key, member, "one line, with the unit") for every member, in the order above. `Config` is ModelConfig or
// const ModelConfig.
template <class Visitor, class Config>
void describe(Visitor&& visit, Config& config) requires std::is_same_v<std::remove_const_t<Config>, ModelConfig> {
  visit("layers", config.layers, "number of blocks (attention and MLP)");
  visit("dim", config.dim, "features of the residual stream");
  visit("heads", config.heads, "query heads");
  visit("kv_heads", config.kv_heads, "key and value heads, a divisor of heads; 0 = heads");
  visit("head_dim", config.head_dim, "features of one head; 0 = dim / heads");
  visit("hidden", config.hidden, "features inside the MLP; 0 = 4 dim (gelu) or 8/3 dim rounded up to 32 (swiglu)");
  visit("vocab", config.vocab, "number of tokens");
  visit("max_seq", config.max_seq, "positions that can be learned (position: learned); no limit for rope and none");
  visit("norm", config.norm, "layernorm | rmsnorm");
  visit("position", config.position, "learned | rope | none");
  visit("activation", config.activation, "gelu | swiglu");
  visit("bias", config.bias, "whether linear layers have a bias");
  visit("tied", config.tied, "whether the output layer shares the token embedding");
  visit("dropout", config.dropout, "probability of dropping an element, in [0, 1), after the embedding, attention and MLP");
  visit("rope_base", config.rope_base, "base of the rotary angles (position: rope)");
  visit("norm_epsilon", config.norm_epsilon, "added to the variance under the square root");
}

// The defaults of a style, "gpt2" or "llama"; sizes are those of ModelConfig{}. Throws Error(kBadInput) for other names.
ModelConfig model_style(std::string_view name);

// Refuses what cannot be built, naming the key, both values and the remedy: heads that are no multiple of kv_heads,
// sizes below 1, unknown words, an odd head_dim with rope, a dropout outside [0, 1). Throws Error(kBadInput).
void validate(const ModelConfig& config);

// validate(), then the zeros that stand for a default (kv_heads, head_dim, hidden) replaced by their values.
ModelConfig resolve(ModelConfig config);

// Learned numbers of the whole model.
std::int64_t count_parameters(const ModelConfig& config);

}  // namespace dattn
