// Sums in the order of a tree: the subtrees of 2, 4 and 8 shards, added as the tree goes on, have the bits of the whole tree,
// and so has every row of a product, for any number of threads.
#include "core/nn/row_tree.h"

#include <cstring>

#include <gtest/gtest.h>

#include "core/base/threads.h"
#include "core/nn/activation.h"
#include "core/nn/embedding.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"
#include "tests/core/nn/support.h"

namespace dattn {
namespace {

using testing::normal;

constexpr std::int64_t kLeaf = 20, kRows = kLeaves * kLeaf, kIn = 700, kOut = 300;  // blocks of columns and of weights

bool same_bits(const TensorView& a, const TensorView& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data, b.data, static_cast<std::size_t>(a.bytes())) == 0;
}

// The rows that part `index` of `parts` holds in layout zigzag, as one tensor.
Tensor shard(const TensorView& whole, int parts, int index) {
  const std::int64_t chunk = kRows / (2 * parts);
  Tensor rows = Tensor::uninitialized(whole.dtype, {2 * chunk, whole.size(1)});
  copy(whole.slice(0, index * chunk, chunk), rows->slice(0, 0, chunk));
  copy(whole.slice(0, (2 * parts - 1 - index) * chunk, chunk), rows->slice(0, chunk, chunk));
  return rows;
}

std::vector<std::int32_t> shard(std::span<const std::int32_t> whole, int parts, int index) {
  std::vector<std::int32_t> rows;
  const std::int64_t chunk = kRows / (2 * parts);
  for (const std::int64_t begin : {index * chunk, (2 * parts - 1 - index) * chunk}) {
    for (std::int64_t row = begin; row < begin + chunk; ++row) rows.push_back(whole[static_cast<std::size_t>(row)]);
  }
  return rows;
}

Parameter parameter_of(const Shape& shape, std::uint64_t stream) {
  Parameter made;
  made.global_shape = shape;
  made.held = made.owned = {0, shape[0]};
  made.value = normal(shape, stream);
  made.gradient = Tensor(DType::kF32, shape);
  return made;
}

// Everything that one shard's layers compute: what belongs to its rows, and what is summed over them.
struct Results {
  Tensor y, dx, dnormed;                          // [rows, ..]
  Tensor dweight, dbias, dscale, dshift, dtable;  // sums
  std::vector<TensorView> rows() const { return {y, dx, dnormed}; }
  std::vector<TensorView> sums() const { return {dweight, dbias, dscale, dshift, dtable}; }
};

Results compute(DType type, int parts, int index, int threads) {
  set_num_threads(threads);
  const Tensor x = to_dtype(shard(normal({kRows, kIn}, 1), parts, index), type);
  const Tensor dy = to_dtype(shard(normal({kRows, kOut}, 2), parts, index), type);
  const Tensor stream = shard(normal({kRows, kIn}, 3), parts, index), gradient = shard(normal({kRows, kIn}, 4), parts, index);
  std::vector<std::int32_t> tokens;
  for (std::int64_t row = 0; row < kRows; ++row) tokens.push_back(static_cast<std::int32_t>(row * row % 11));
  const RowTree tree = folded_rows(kRows / parts, kLeaves / parts);

  Parameter weight = parameter_of({kOut, kIn}, 5), bias = parameter_of({kOut}, 6), scale = parameter_of({kIn}, 7),
            shift = parameter_of({kIn}, 8), table = parameter_of({11, kIn}, 9);
  const Linear layer{&weight, &bias};
  const Norm norm{&scale, &shift, true, 1e-5f};
  Results results;
  results.y = linear_forward(layer, x, type, tree);
  results.dx = Tensor(DType::kF32, {x->size(0), kIn});
  linear_backward_input(layer, dy, results.dx, false, tree);
  linear_backward_weights(layer, x, dy, tree);
  const Tensor stats = Tensor(DType::kF32, {x->size(0), 2});
  norm_forward(norm, stream, stats);
  results.dnormed = Tensor(DType::kF32, stream->shape);
  norm_backward(norm, stream, stats, gradient, results.dnormed, tree);
  embedding_backward(table, shard(tokens, parts, index), gradient, tree);
  results.dweight = std::move(weight.gradient);
  results.dbias = std::move(bias.gradient);
  results.dscale = std::move(scale.gradient);
  results.dshift = std::move(shift.gradient);
  results.dtable = std::move(table.gradient);
  set_num_threads(1);
  return results;
}

class Tree : public ::testing::TestWithParam<DType> {};

TEST_P(Tree, ShardsAddUpToTheSameBits) {
  const Results whole = compute(GetParam(), 1, 0, 1);
  for (const auto& [parts, threads] : {std::pair{1, 3}, {2, 1}, {4, 2}, {8, 1}, {8, 3}}) {
    std::vector<Results> shards;
    for (int index = 0; index < parts; ++index) shards.push_back(compute(GetParam(), parts, index, threads));
    for (std::size_t i = 0; i < whole.rows().size(); ++i) {
      for (int index = 0; index < parts; ++index) {
        EXPECT_TRUE(same_bits(shards[static_cast<std::size_t>(index)].rows()[i], shard(whole.rows()[i], parts, index)))
            << parts << " parts, rows " << i << " of part " << index;
      }
    }
    for (std::size_t i = 0; i < whole.sums().size(); ++i) {
      const Tensor sum = Tensor::uninitialized(DType::kF32, whole.sums()[i].shape);
      tree_sum(0, static_cast<std::size_t>(parts), sum, [&](std::size_t index, const TensorView& to, bool accumulate) {
        if (!accumulate) fill_zero(to);
        add_contiguous(shards[index].sums()[i], to);
      });
      EXPECT_TRUE(same_bits(sum, whole.sums()[i])) << parts << " parts, sum " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Tree, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

// Elements are computed in vectors with a scalar rest: an element's bits must not depend on which of the two it falls into.
TEST(Tree, ActivationsDoNotDependOnTheirPlace) {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const Tensor gate = to_dtype(normal({1, 200}, 1), type), up = to_dtype(normal({1, 200}, 2), type);
    const Tensor da = normal({1, 200}, 3);
    const SwigluGradients whole = swiglu_backward(gate, up, da);
    const GeluGradients gelu = gelu_backward(up, da);
    for (std::int64_t begin = 0; begin < 40; ++begin) {
      const std::int64_t count = 200 - begin - 3 * begin % 17;
      const auto cut = [&](const TensorView& view) { return view.slice(1, begin, count); };
      const SwigluGradients part = swiglu_backward(cut(gate), cut(up), cut(da));
      const GeluGradients gelu_part = gelu_backward(cut(up), cut(da));
      EXPECT_TRUE(same_bits(part.a, cut(whole.a)) && same_bits(part.dup, cut(whole.dup)) &&
                  same_bits(part.dgate, cut(whole.dgate)) && same_bits(gelu_part.a, cut(gelu.a)) &&
                  same_bits(gelu_part.du, cut(gelu.du)) && same_bits(swiglu_forward(cut(gate), cut(up)), part.a) &&
                  same_bits(gelu_forward(cut(up)), gelu_part.a))
          << "from element " << begin;
    }
  }
}

}  // namespace
}  // namespace dattn
