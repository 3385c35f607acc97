// Decoding on a device by graphs: the same bits as kernel by kernel, over many blocks of keys, with and without a window.
#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "core/device/step_graph.h"
#include "core/nn/transformer.h"
#include "parallel/comm/thread.h"
#include "plugins/infer/cached_attention.h"
#include "tests/core/device/on_cuda.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

constexpr std::int64_t kWindow = 150;  // three blocks of keys

ModelConfig small_model(const char* position) {
  ModelConfig model = model_style("llama");
  model.layers = 2;
  model.dim = 32;
  model.heads = 4;
  model.kv_heads = 2;
  model.head_dim = 8;
  model.hidden = 48;
  model.vocab = 40;
  model.max_seq = kWindow;
  model.position = position;
  return model;
}

// A model that reads one sequence.
class Reader {
 public:
  Reader(const Mesh& mesh, const ModelConfig& model, DType type, const Mask& mask)
      : attention_(mesh, {.layers = static_cast<int>(model.layers),
                          .heads = model.heads,
                          .kv_heads = model.kv_heads,
                          .dim = model.head_dim,
                          .mask = mask,
                          .window = kWindow,
                          .dtype = type}),
        transformer_(model, {.part = {}, .compute = type, .seed = 3}, attention_, boundary_, vocabulary_),
        logits_(Tensor::uninitialized(DType::kF32, {1, model.vocab})) {
    transformer_.freeze();
  }

  // Logits behind the tokens, on the host. A single token goes through the graph, if there is one.
  Tensor read(std::span<const std::int32_t> tokens, StepGraph* graph) {
    const NextTokens next(tokens, attention_.length());
    const std::array<std::int64_t, 1> last{static_cast<std::int64_t>(tokens.size()) - 1};
    const auto step = [&] { copy(transformer_.logits(next.batch(), last), logits_); };
    if (graph != nullptr && tokens.size() == 1)
      graph->run(attention_.next_token_key(), step);
    else
      step();
    return to_device(logits_, Device{});
  }

 private:
  Boundary boundary_;
  VocabularyReduction vocabulary_;
  CachedAttention attention_;
  Transformer transformer_;
  Tensor logits_;
};

class TokenGraph : public testing::OnCuda, public ::testing::WithParamInterface<std::tuple<const char*, DType, const char*>> {};

TEST_P(TokenGraph, SameLogitsBitForBit) {
  const auto& [position, type, window] = GetParam();
  const Mask mask = std::string(window) == "causal" ? Mask::causal() : Mask::window(70, 0);
  const ModelConfig model = small_model(position);
  run_thread_ranks(1, {}, [&](Communicator& world) {
    const DeviceScope scope(testing::kCuda);
    const Mesh mesh(world, mesh_of(1, 1, 1, 1));
    Reader one(mesh, model, type, mask), other(mesh, model, type, mask);
    StepGraph graph;
    const std::vector<std::int32_t> prompt{3, 1, 4, 1, 5, 9, 2, 6};
    one.read(prompt, nullptr);
    other.read(prompt, &graph);
    for (std::int64_t at = 8; at < kWindow; ++at) {
      const std::array<std::int32_t, 1> token{static_cast<std::int32_t>(at * 7 % 40)};
      const Tensor expected = one.read(token, nullptr), got = other.read(token, &graph);
      ASSERT_EQ(std::memcmp(expected.ptr<float>(), got.ptr<float>(), static_cast<std::size_t>(expected->bytes())), 0)
          << "position " << at;
    }
    EXPECT_GT(graph.replays(), kWindow / 2);
  });
}

INSTANTIATE_TEST_SUITE_P(All, TokenGraph,
                         ::testing::Values(std::tuple{"rope", DType::kBF16, "causal"},
                                           std::tuple{"learned", DType::kF32, "causal"},
                                           std::tuple{"rope", DType::kF32, "window"}),
                         [](const auto& param) {
                           return std::string(std::get<0>(param.param)) + "_" + std::string(name_of(std::get<1>(param.param))) +
                                  "_" + std::get<2>(param.param);
                         });

}  // namespace
}  // namespace dattn
