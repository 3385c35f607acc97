#include "core/nn/embedding.h"

#include <cstring>
#include <map>
#include <vector>

#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kRows = 64;     // rows of one block
constexpr std::int64_t kColumns = 64;  // features whose sums one thread carries

DATTN_VECTORIZED void add_row(const float* from, float* to, std::int64_t dim) {
  for (std::int64_t j = 0; j < dim; ++j) to[j] += from[j];
}

// gradient[rows[i]] += dx[i], in row order whatever the number of threads; negative rows are left out.
void scatter_add(const TensorView& dx, std::span<const std::int32_t> rows, const TensorView& gradient) {
  if (on_cuda({&dx, &gradient})) return cuda_nn().scatter_rows(dx, RowGroups(rows).view(), gradient, cuda_stream());
  const std::int64_t dim = dx.size(1);
  parallel_blocks(dim, kColumns, [&](std::int64_t begin, std::int64_t end) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const float* from = dx.ptr<float>() + static_cast<std::int64_t>(i) * dim + begin;
      if (rows[i] >= 0) add_row(from, gradient.ptr<float>() + rows[i] * dim + begin, end - begin);
    }
  });
}

// Sums in the order of a tree hold only the targets that occur.
struct SumPlaces {
  std::vector<std::int32_t> targets;  // of each sum
  std::vector<std::int32_t> place;    // of each row's target among the sums, or -1

  explicit SumPlaces(std::span<const std::int32_t> rows) {
    std::map<std::int32_t, std::int32_t> known;
    for (const std::int32_t target : rows) {
      const auto [entry, fresh] = known.emplace(target, static_cast<std::int32_t>(targets.size()));
      if (fresh && target >= 0) targets.push_back(target);
      place.push_back(target < 0 ? -1 : entry->second);
    }
  }
};

// The same in the order of a tree.
void scatter_add_by_tree(const TensorView& dx, std::span<const std::int32_t> rows, const TensorView& gradient,
                         const RowTree& tree) {
  const SumPlaces sums(rows);
  const Tensor total = Tensor::uninitialized(DType::kF32, {static_cast<std::int64_t>(sums.targets.size()), dx.size(1)});
  tree_sum(0, tree.leaves.size(), total, [&](std::size_t i, const TensorView& to, bool accumulate) {
    const Interval leaf = tree.leaves[i];
    const auto begin = static_cast<std::size_t>(leaf.begin), count = static_cast<std::size_t>(leaf.count());
    if (!accumulate) fill_zero(to);
    scatter_add(dx.slice(0, leaf.begin, leaf.count()), std::span(sums.place).subspan(begin, count), to);
  });
  scatter_add(total, sums.targets, gradient);
}

// The row of the slice that a token has, or -1.
std::int64_t slice_row(const Parameter& table, std::int64_t token) {
  return token >= table.held.begin && token < table.held.end ? token - table.held.begin : -1;
}

// The rows of the table that the tokens name, and the positions of rows of the residual stream.
std::vector<std::int32_t> slice_rows(const Parameter& table, std::span<const std::int32_t> tokens) {
  std::vector<std::int32_t> rows;
  for (const std::int32_t token : tokens) rows.push_back(static_cast<std::int32_t>(slice_row(table, token)));
  return rows;
}
std::vector<std::int32_t> table_positions(const TokenRows& rows) {
  std::vector<std::int32_t> positions;
  for (std::int64_t row = 0; row < rows.count; ++row) positions.push_back(static_cast<std::int32_t>(rows.position(row)));
  return positions;
}

}  // namespace

Tensor embedding_forward(const Parameter& table, std::span<const std::int32_t> tokens) {
  const std::int64_t dim = table.global_shape[1], count = static_cast<std::int64_t>(tokens.size());
  Tensor x = Tensor::uninitialized(DType::kF32, {count, dim});
  if (on_cuda({&x.view(), &table.value.view()})) {
    const Tensor index = to_device(slice_rows(table, tokens));
    cuda_nn().gather_rows(table.value, index.ptr<std::int32_t>(), false, x, cuda_stream());
    return x;
  }
  const auto bytes = static_cast<std::size_t>(dim) * sizeof(float);
  parallel_blocks(count, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t source = slice_row(table, tokens[static_cast<std::size_t>(row)]);
      float* place = x.ptr<float>() + row * dim;
      if (source >= 0)
        std::memcpy(place, table.value.ptr<float>() + source * dim, bytes);
      else
        std::memset(place, 0, bytes);
    }
  });
  return x;
}

void embedding_backward(Parameter& table, std::span<const std::int32_t> tokens, const TensorView& dx, const RowTree& tree) {
  const TensorView& gradient = table.gradient2.defined() ? table.gradient2 : table.gradient;
  const std::vector<std::int32_t> rows = slice_rows(table, tokens);
  if (tree.empty())
    scatter_add(dx, rows, gradient);
  else
    scatter_add_by_tree(dx, rows, gradient, tree);
}

void position_forward(const Parameter& table, const TokenRows& rows, const TensorView& x) {
  if (on_cuda({&x, &table.value.view()})) {
    const Tensor index = to_device(table_positions(rows));
    return cuda_nn().gather_rows(table.value, index.ptr<std::int32_t>(), true, x, cuda_stream());
  }
  const std::int64_t dim = x.size(1);
  parallel_blocks(rows.count, kRows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      add_row(table.value.ptr<float>() + rows.position(row) * dim, x.ptr<float>() + row * dim, dim);
    }
  });
}

void position_backward(Parameter& table, const TokenRows& rows, const TensorView& dx) {
  scatter_add(dx, table_positions(rows), table.gradient);
}

}  // namespace dattn
