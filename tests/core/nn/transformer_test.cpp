#include "core/nn/transformer.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

using testing::OwnedBatch;
using testing::small_model;

struct Model {
  LocalAttention attention;
  Boundary boundary;
  VocabularyReduction vocabulary;
  Transformer transformer;

  explicit Model(const ModelConfig& config, const TransformerOptions& options = {}, const Mask& mask = Mask::causal(),
                 std::optional<double> attention_dropout = {})
      : attention(mask, {}, {}, {.p = attention_dropout.value_or(config.dropout), .seed = 3, .heads = config.heads}),
        transformer(config, options, attention, boundary, vocabulary) {
    set_num_threads(1);  // the shapes are too small for more
    testing::scale_up(transformer);
  }
};

TransformerOptions recomputing(Recompute recompute) {
  TransformerOptions options;
  options.recompute = recompute;
  return options;
}

struct Case {
  std::string name;
  std::string style;
  bool tied;
  double dropout;
  bool encoder;

  friend std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }
};

class TransformerCases : public ::testing::TestWithParam<Case> {
 protected:
  static ModelConfig config_of(const Case& c) {
    ModelConfig config = small_model(c.style);
    config.tied = c.tied;
    config.dropout = c.dropout;
    return config;
  }
};

TEST_P(TransformerCases, GradientsByFiniteDifferences) {
  const Case& c = GetParam();
  Model model(config_of(c), {}, c.encoder ? Mask::full() : Mask::causal());
  const OwnedBatch batch(2, 5, 29);
  model.transformer.zero_gradients();
  const double loss = model.transformer.forward_backward(batch.view);
  EXPECT_GT(loss, 0.5);
  std::vector<Tensor> gradients;  // the differences below go on adding to the model's own
  for (Parameter* parameter : model.transformer.parameters()) gradients.push_back(parameter->gradient.clone());
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    Parameter* parameter = model.transformer.parameters()[i];
    const Tensor& gradient = gradients[i];
    EXPECT_GT(testing::largest(gradient), 0.0) << parameter->name << " has no gradient";
    testing::expect_gradient(
        parameter->value, gradient, [&] { return model.transformer.forward_backward(batch.view); }, parameter->name, 1e-2,
        2e-2);
  }
}

TEST_P(TransformerCases, RecomputationChangesNothing) {
  const ModelConfig config = config_of(GetParam());
  Model kept(config), again(config, recomputing(Recompute::kBlock));
  const OwnedBatch batch(2, 5, 29);
  kept.transformer.zero_gradients();
  again.transformer.zero_gradients();
  EXPECT_EQ(kept.transformer.forward_backward(batch.view), again.transformer.forward_backward(batch.view));
  for (Parameter* parameter : kept.transformer.parameters()) {
    EXPECT_EQ(testing::largest_difference(parameter->gradient, again.transformer.parameter(parameter->name).gradient), 0.0)
        << parameter->name;
  }
}

// The bits of zeros and sums, whatever the gradients were; also where rows come to the output layer in several pieces.
TEST_P(TransformerCases, TheFirstOfAStepWritesGradients) {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    TransformerOptions options;
    options.compute = type;
    options.logits_at_a_time = 3 * 29;
    Model added(config_of(GetParam()), options), written(config_of(GetParam()), options);
    OwnedBatch batch(2, 5, 29);
    for (Parameter* parameter : written.transformer.parameters()) {
      std::fill_n(parameter->gradient.ptr<float>(), parameter->elements(), 1e3f);
    }
    added.transformer.zero_gradients();
    for (const bool first : {true, false}) {
      added.transformer.forward_backward(batch.view);
      batch.view.first = first;
      written.transformer.forward_backward(batch.view);
      batch.view.first = false;
    }
    for (Parameter* parameter : added.transformer.parameters()) {
      EXPECT_EQ(testing::largest_difference(parameter->gradient, written.transformer.parameter(parameter->name).gradient), 0.0)
          << parameter->name << ", " << name_of(type);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Styles, TransformerCases,
                         ::testing::Values(Case{"gpt2", "gpt2", true, 0.0, false},
                                           Case{"gpt2_dropout", "gpt2", false, 0.2, false},
                                           Case{"llama", "llama", false, 0.0, false},
                                           Case{"llama_tied_dropout", "llama", true, 0.1, false},
                                           Case{"encoder", "gpt2", true, 0.0, true}),
                         [](const auto& instance) { return instance.param.name; });

// Which probabilities are dropped follows step, layer and batch row; only training drops any.
TEST(Transformer, DropsAttentionByStepLayerAndRowInTrainingOnly) {
  struct Recorder final : Attention {
    std::vector<AttentionSite> sites;
    Tensor forward(const AttentionSite& site, const TensorView& q, const TensorView&, const TensorView&) override {
      sites.push_back(site);
      return Tensor(q.dtype, q.shape);
    }
    Gradients backward(const AttentionSite& site, const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView&) override {
      sites.push_back(site);
      return {Tensor(DType::kF32, q.shape), Tensor(DType::kF32, k.shape), Tensor(DType::kF32, v.shape)};
    }
  } attention;
  Boundary boundary;
  VocabularyReduction vocabulary;
  const ModelConfig config = small_model("gpt2");
  Transformer model(config, recomputing(Recompute::kBlock), attention, boundary, vocabulary);
  OwnedBatch batch(1, 4, 29);
  std::map<std::uint64_t, std::pair<std::uint64_t, int>> sites;  // step and layer of each stream
  for (batch.view.step = 0; batch.view.step < 3; ++batch.view.step) {
    attention.sites.clear();
    model.forward_backward(batch.view);
    EXPECT_EQ(attention.sites.size(), 3 * 2u) << "forward, recomputation, backward of two layers";
    for (const AttentionSite& site : attention.sites) {
      EXPECT_TRUE(site.training);
      EXPECT_EQ(site.batch_begin, batch.view.batch_begin);
      const std::pair place{batch.view.step, site.layer};
      EXPECT_EQ(sites.emplace(site.dropout_stream, place).first->second, place) << "two places have one stream";
    }
  }
  EXPECT_EQ(sites.size(), 3 * 2u);
  attention.sites.clear();
  model.loss(batch.view);
  for (const AttentionSite& site : attention.sites) EXPECT_FALSE(site.training);
}

TEST(Transformer, OnlyTrainingDropsAttention) {
  const ModelConfig config = small_model("llama");
  Model plain(config), dropping(config, {}, Mask::causal(), 0.3);
  OwnedBatch batch(1, 12, 29);
  const double loss = dropping.transformer.forward_backward(batch.view);
  EXPECT_NE(loss, plain.transformer.forward_backward(batch.view));
  EXPECT_EQ(dropping.transformer.loss(batch.view), plain.transformer.loss(batch.view));
  ++batch.view.batch_begin;
  EXPECT_NE(loss, dropping.transformer.forward_backward(batch.view));
}

TEST(Transformer, RecomputationKeepsLess) {
  ModelConfig config = small_model("llama");
  config.layers = 8;
  const OwnedBatch batch(8, 16, 29);
  std::int64_t peaks[2] = {};
  for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
    Model model(config, recomputing(recompute));
    const std::int64_t before = tensor_bytes_now();
    reset_tensor_bytes_peak();
    model.transformer.forward_backward(batch.view);
    peaks[static_cast<int>(recompute)] = tensor_bytes_peak() - before;
    EXPECT_EQ(tensor_bytes_now(), before) << "activations are left behind";
  }
  EXPECT_LT(2 * peaks[1], peaks[0]);
}

TEST(Transformer, LogitsAndHeldOutLossAgree) {
  ModelConfig config = small_model("llama");
  config.dropout = 0.5;  // must not act here
  Model model(config);
  const OwnedBatch batch(2, 5, 29);
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 9; row >= 0; --row) rows.push_back(row);
  const Tensor logits = model.transformer.logits(batch.view, rows);
  double loss = 0.0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int32_t target = batch.targets[static_cast<std::size_t>(rows[i])];
    if (target < 0) continue;
    double sum = 0.0;
    const auto row = static_cast<std::int64_t>(i);
    for (std::int64_t j = 0; j < 29; ++j) sum += std::exp(static_cast<double>(logits->at<float>(row, j)));
    loss += std::log(sum) - static_cast<double>(logits->at<float>(row, target));
  }
  EXPECT_NEAR(model.transformer.loss(batch.view), loss * batch.view.loss_scale, 1e-6);
}

TEST(Transformer, DropoutChangesWithTheStepAndRepeats) {
  ModelConfig config = small_model("gpt2");
  config.dropout = 0.2;
  Model model(config);
  OwnedBatch batch(2, 5, 29);
  const double first = model.transformer.forward_backward(batch.view);
  EXPECT_EQ(model.transformer.forward_backward(batch.view), first);
  batch.view.step += 1;
  EXPECT_GT(std::abs(model.transformer.forward_backward(batch.view) - first), 1e-4);
}

TEST(Transformer, BatchRowsAddUp) {
  Model model(small_model("gpt2"));
  const OwnedBatch batch(3, 5, 29);
  model.transformer.zero_gradients();
  const double whole = model.transformer.forward_backward(batch.view);
  const Tensor gradient = model.transformer.parameter("blocks.0.attention.k.weight").gradient.clone();
  model.transformer.zero_gradients();
  double sum = 0.0;
  for (std::int64_t row = 0; row < 3; ++row) {
    TokenBatch one = batch.view;
    one.batch = 1;
    one.batch_begin += row;
    one.tokens = one.tokens.subspan(static_cast<std::size_t>(5 * row), 5);
    one.targets = one.targets.subspan(static_cast<std::size_t>(5 * row), 5);
    sum += model.transformer.forward_backward(one);
  }
  EXPECT_NEAR(sum, whole, 1e-6);
  const Tensor& added = model.transformer.parameter("blocks.0.attention.k.weight").gradient;
  EXPECT_LT(testing::largest_difference(added, gradient), 1e-5 * testing::largest(gradient));
}

class TransformerInHalves : public ::testing::TestWithParam<DType> {};

TEST_P(TransformerInHalves, IsCloseToFp32) {
  const ModelConfig config = small_model("llama");
  TransformerOptions in_halves;
  in_halves.compute = GetParam();
  Model exact(config), rounded(config, in_halves);
  const OwnedBatch batch(2, 8, 29);
  exact.transformer.zero_gradients();
  rounded.transformer.zero_gradients();
  const double loss = exact.transformer.forward_backward(batch.view);
  EXPECT_NEAR(rounded.transformer.forward_backward(batch.view), loss, 0.02 * loss);
  for (Parameter* parameter : exact.transformer.parameters()) {
    const Tensor& other = rounded.transformer.parameter(parameter->name).gradient;
    const double cosine = testing::dot(parameter->gradient, other) /
                          std::sqrt(testing::dot(parameter->gradient, parameter->gradient) * testing::dot(other, other));
    EXPECT_GT(cosine, 0.99) << parameter->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Type, TransformerInHalves, ::testing::Values(DType::kBF16, DType::kF16),
                         [](const auto& type) { return std::string(name_of(type.param)); });

TEST(Transformer, RoundsWeightsAnewUnlessFrozen) {
  TransformerOptions options;
  options.compute = DType::kBF16;
  Model model(small_model("llama"), options);
  const OwnedBatch batch(1, 5, 29);
  const double before = model.transformer.loss(batch.view);
  Parameter& weight = model.transformer.parameter("blocks.0.mlp.up.weight");
  const Tensor kept = weight.value.clone();
  fill_zero(weight.value);
  EXPECT_GT(std::abs(model.transformer.loss(batch.view) - before), 1e-4);
  copy(kept, weight.value);
  model.transformer.freeze();
  fill_zero(weight.value);
  EXPECT_EQ(model.transformer.loss(batch.view), before);
}

TEST(Transformer, NoRowsAtAll) {
  Model model(small_model("gpt2"));
  OwnedBatch batch(2, 0, 29);
  batch.view.loss_scale = 1.0;
  EXPECT_EQ(model.transformer.forward_backward(batch.view), 0.0);
  EXPECT_EQ(model.transformer.loss(batch.view), 0.0);
}

TEST(Transformer, RefusesTokensAndPositionsOutside) {
  Model model(small_model("gpt2"));
  OwnedBatch batch(1, 5, 29);
  batch.tokens[3] = 29;
  EXPECT_THROW(model.transformer.loss(batch.view), Error);
  OwnedBatch far(1, 5, 29);
  far.positions[4] = 16;
  EXPECT_THROW(model.transformer.loss(far.view), Error);
}

TEST(ModelConfigTest, CountsAndRefusals) {
  for (const std::string style : {"gpt2", "llama"}) {
    const ModelConfig config = small_model(style);
    Model model(config);
    std::int64_t count = 0;
    for (Parameter* parameter : model.transformer.parameters()) count += parameter->elements();
    EXPECT_EQ(count, count_parameters(config));
  }
  ModelConfig config = small_model("gpt2");
  config.kv_heads = 4;  // of 6 heads
  EXPECT_THROW(validate(config), Error);
  config = small_model("gpt2");
  config.norm = "batchnorm";
  EXPECT_THROW(validate(config), Error);
  config = small_model("llama");
  config.head_dim = 5;
  EXPECT_THROW(validate(config), Error);
  EXPECT_THROW(model_style("bert"), Error);
  EXPECT_EQ(resolve(model_style("llama")).hidden, 512);
}

TEST(ModelConfigTest, DescriptionNamesEveryMember) {
  std::vector<std::string> keys;
  const ModelConfig config;
  describe(
      [&](const char* key, const auto&, const char* text) {
        keys.emplace_back(key);
        EXPECT_GT(std::strlen(text), 0u);
      },
      config);
  EXPECT_EQ(keys.size(), 16u);
}

}  // namespace
}  // namespace dattn
