#include "core/nn/row_tree.h"

#include "core/base/error.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kBlock = 16384;  // elements of one block

DATTN_VECTORIZED void add_block(const float* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace

RowTree folded_rows(std::int64_t rows, int leaves) {
  ensure(leaves >= 2 && leaves % 2 == 0 && rows % leaves == 0, "{} rows in {} leaves", rows, leaves);
  RowTree tree;
  const std::int64_t length = rows / leaves;
  for (int i = 0; i < leaves / 2; ++i) {
    for (const std::int64_t leaf : {i, leaves - 1 - i}) tree.leaves.push_back({leaf * length, (leaf + 1) * length});
  }
  return tree;
}

void add_contiguous(const TensorView& from, const TensorView& to) {
  if (on_cuda({&from, &to})) return add(from, to);
  const std::int64_t count = to.elements();
  parallel_blocks(count, kBlock, [&](std::int64_t begin, std::int64_t end) {
    add_block(from.ptr<float>() + begin, to.ptr<float>() + begin, end - begin);
  });
}

double tree_sum(std::span<const double> leaves) {
  if (leaves.size() == 1) return leaves[0];
  return tree_sum(leaves.first(leaves.size() / 2)) + tree_sum(leaves.subspan(leaves.size() / 2));
}

}  // namespace dattn
