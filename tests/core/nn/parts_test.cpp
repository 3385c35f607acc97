// A model cut into parts (heads, hidden units, vocabulary; with and without cut residual rows), each part on a thread of
// its own, against the whole model: same initial values, loss and gradients.
#include <barrier>
#include <thread>

#include "core/base/threads.h"
#include "core/nn/optimizer.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

using testing::OwnedBatch;
using testing::small_model;

// Sums and maxima over threads that all make the same calls.
class Group {
 public:
  explicit Group(int size) : views_(static_cast<std::size_t>(size)), barrier_(size) {}
  int size() const { return static_cast<int>(views_.size()); }

  template <class Fold>
  void reduce(int index, const TensorView& view, const Fold& fold) {
    views_[static_cast<std::size_t>(index)] = view;
    barrier_.arrive_and_wait();
    Tensor result = to_dtype(views_[0], DType::kF32);
    for (std::size_t other = 1; other < views_.size(); ++other) {
      for (std::int64_t i = 0; i < view.elements(); ++i) {
        result.ptr<float>()[i] = fold(result.ptr<float>()[i], views_[other].ptr<float>()[i]);
      }
    }
    barrier_.arrive_and_wait();
    copy(result, view);
    barrier_.arrive_and_wait();
  }
  void sum(int index, const TensorView& view) {
    reduce(index, view, [](float a, float b) { return a + b; });
  }

 private:
  std::vector<TensorView> views_;
  std::barrier<> barrier_;
};

class GroupBoundary final : public Boundary {
 public:
  GroupBoundary(Group& group, int index, bool cut) : group_(group), index_(index), cut_(cut) {}
  std::int64_t residual_rows(std::int64_t rows) const override { return mine(rows).count(); }
  std::int64_t residual_begin(std::int64_t rows) const override { return mine(rows).begin; }
  Tensor enter(Tensor x, std::int64_t rows) override { return cut_ ? gather(x, rows) : std::move(x); }
  Tensor enter_backward(Tensor dy, std::int64_t rows) override { return summed(std::move(dy), rows); }
  Tensor leave(Tensor x, std::int64_t rows) override { return summed(std::move(x), rows); }
  Tensor leave_backward(Tensor dy, std::int64_t rows) override { return cut_ ? gather(dy, rows) : std::move(dy); }

 private:
  Interval mine(std::int64_t rows) const { return cut_ ? split_evenly(rows, group_.size(), index_) : Interval{0, rows}; }
  Tensor gather(const Tensor& x, std::int64_t rows) {
    Tensor all(DType::kF32, {rows, x->size(1)});
    copy(x, all->slice(0, mine(rows).begin, mine(rows).count()));
    group_.sum(index_, all);
    return to_dtype(all, x->dtype);
  }
  Tensor summed(Tensor x, std::int64_t rows) {
    group_.sum(index_, x);
    return to_dtype(x->slice(0, mine(rows).begin, mine(rows).count()), DType::kF32);
  }
  Group& group_;
  int index_;
  bool cut_;
};

class GroupVocabulary final : public VocabularyReduction {
 public:
  GroupVocabulary(Group& group, int index) : group_(group), index_(index) {}
  void sum(const TensorView& view) override { group_.sum(index_, view); }
  void maximum(const TensorView& view) override {
    group_.reduce(index_, view, [](float a, float b) { return std::max(a, b); });
  }

 private:
  Group& group_;
  int index_;
};

// What one part ends with, in the shape of the whole model.
struct PartResult {
  double loss = 0.0;
  double held_out = 0.0;
  double squares = 0.0;           // of owned gradients, after the sums
  std::vector<Tensor> values;     // whole_of(value), owned elements only elsewhere zero
  std::vector<Tensor> gradients;  // of this part, summed where the flag says so
};

Tensor owned_whole(const Parameter& parameter, const TensorView& local) {
  Tensor whole(DType::kF32, parameter.global_shape);
  copy(owned_of(parameter, local), whole->slice(parameter.cut_axis, parameter.owned.begin, parameter.owned.count()));
  return whole;
}

PartResult run_part(const ModelConfig& config, Group& group, int index, bool cut, const TokenBatch& batch) {
  const ModelPart part{index, group.size()};
  const ModelConfig resolved = resolve(config);
  const PartRanges ranges = ranges_of(resolved, part);
  LocalAttention attention(Mask::causal(),
                           HeadMap{ranges.heads.begin, ranges.kv_heads.begin, resolved.heads / resolved.kv_heads});
  GroupBoundary boundary(group, index, cut);
  GroupVocabulary vocabulary(group, index);
  Transformer model(config, {.part = part}, attention, boundary, vocabulary);
  PartResult result;
  for (Parameter* parameter : model.parameters()) result.values.push_back(owned_whole(*parameter, parameter->value));
  testing::scale_up(model);
  model.zero_gradients();
  result.loss = model.forward_backward(batch);
  result.held_out = model.loss(batch);
  for (Parameter* parameter : model.parameters()) {
    if (parameter->sum_over_tensor) {
      const Tensor whole = whole_of(*parameter, parameter->gradient);
      group.sum(index, whole);
      copy(held_of(*parameter, whole), parameter->gradient);
    }
    result.squares += squared_norm(whole_runs({&parameter, 1}));
    result.gradients.push_back(owned_whole(*parameter, parameter->gradient));
  }
  return result;
}

std::vector<PartResult> run_parts(const ModelConfig& config, int parts, bool cut, const TokenBatch& batch) {
  Group group(parts);
  std::vector<PartResult> results(static_cast<std::size_t>(parts));
  std::vector<std::thread> threads;
  for (int index = 0; index < parts; ++index) {
    threads.emplace_back([&, index] {
      set_num_threads(1);
      results[static_cast<std::size_t>(index)] = run_part(config, group, index, cut, batch);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

struct Case {
  std::string style;
  int parts;
  bool cut;
  bool tied;

  friend std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << c.style << "_of_" << c.parts << (c.cut ? "_rows_cut" : "") << (c.tied ? "_tied" : "");
  }
};

// A bias of k moves all scores of a query alike: its gradient is nothing but rounding.
constexpr double kRounding = 1e-8;

class Parts : public ::testing::TestWithParam<Case> {};

TEST_P(Parts, EqualTheWhole) {
  const Case& c = GetParam();
  ModelConfig config = small_model(c.style);
  config.tied = c.tied;
  config.dropout = 0.1;
  const OwnedBatch batch(2, 7, 29);
  const std::vector<PartResult> whole = run_parts(config, 1, false, batch.view),
                                parts = run_parts(config, c.parts, c.cut, batch.view);
  double squares = 0.0;
  for (const PartResult& part : parts) {
    EXPECT_NEAR(part.loss, whole[0].loss, 1e-6 * whole[0].loss);
    EXPECT_NEAR(part.held_out, whole[0].held_out, 1e-6 * whole[0].held_out);
    squares += part.squares;
  }
  EXPECT_NEAR(squares, whole[0].squares, 1e-5 * whole[0].squares);
  for (std::size_t i = 0; i < whole[0].values.size(); ++i) {
    // Owned elements of all parts make the whole tensor, each once.
    Tensor value = parts[0].values[i].clone(), gradient = parts[0].gradients[i].clone();
    for (std::size_t part = 1; part < parts.size(); ++part) {
      add(parts[part].values[i], value);
      add(parts[part].gradients[i], gradient);
    }
    EXPECT_EQ(testing::largest_difference(value, whole[0].values[i]), 0.0) << "initial values of parameter " << i;
    EXPECT_LT(testing::largest_difference(gradient, whole[0].gradients[i]),
              2e-5 * testing::largest(whole[0].gradients[i]) + kRounding)
        << "gradient of parameter " << i;
  }
}

// llama: 6 query and 2 KV heads: 4 parts hold 2, 2, 1, 1 query heads and overlapping KV heads; of 7 parts one is without heads.
INSTANTIATE_TEST_SUITE_P(Cases, Parts,
                         ::testing::Values(Case{"gpt2", 2, false, true}, Case{"gpt2", 2, true, true},
                                           Case{"llama", 2, true, false}, Case{"llama", 3, false, false},
                                           Case{"llama", 4, false, true}, Case{"llama", 4, true, false},
                                           Case{"gpt2", 7, true, false}, Case{"llama", 7, false, true}));

TEST(PartOwnership, OverlappingKeyValueHeads) {
  const ModelConfig config = resolve(small_model("llama"));
  const std::vector<Interval> expected{{0, 1}, {0, 2}, {1, 2}, {1, 2}};
  for (int index = 0; index < 4; ++index) {
    LocalAttention attention(Mask::causal());
    Boundary boundary;
    VocabularyReduction vocabulary;
    const Transformer model(config, {.part = {index, 4}}, attention, boundary, vocabulary);
    const Parameter& k = model.parameter("blocks.1.attention.k.weight");
    const std::int64_t dim = config.head_dim;
    const Interval want = expected[static_cast<std::size_t>(index)];
    EXPECT_EQ(k.held, (Interval{want.begin * dim, want.end * dim}));
    EXPECT_EQ(k.owned.count(), index < 2 ? dim : 0);
    EXPECT_TRUE(k.sum_over_tensor);
    EXPECT_FALSE(model.parameter("blocks.1.attention.q.weight").sum_over_tensor);
    EXPECT_FALSE(model.parameter("norm.weight").sum_over_tensor);
  }
}

}  // namespace
}  // namespace dattn
