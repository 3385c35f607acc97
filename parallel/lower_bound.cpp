#include "parallel/lower_bound.h"

#include <algorithm>

namespace dattn {
namespace {

struct Group {
  double query_heads;  // g
  double queries, keys;
  double own_queries, own_keys;  // rows of a rank

  double most_queries() const { return query_heads * (queries - own_queries); }
  double most_keys() const { return keys - own_keys; }
  double capacity() const { return most_queries() + most_keys(); }
  double cells() const { return query_heads * queries * keys; }

  // f: the most cells that `rows` received rows of the group give; a product of a given sum is greatest where both are equal.
  double covered(double rows) const {
    const double held_queries = query_heads * own_queries;
    const double even = (rows + own_keys - held_queries) / 2;
    const double x = std::clamp(even, std::max(0.0, rows - most_keys()), std::min(rows, most_queries()));
    return (held_queries + x) * (own_keys + rows - x);
  }
};

}  // namespace

double lower_bound_elements(const AttentionShape& shape, int parts, int tensor) {
  if (parts == 1) return 0;
  const auto kv_heads = static_cast<double>(std::max<std::int64_t>(1, shape.kv_heads / tensor));
  const double heads = static_cast<double>(shape.heads) / tensor, groups = static_cast<double>(shape.batch) * kv_heads;
  const auto queries = static_cast<double>(shape.seq_q), keys = static_cast<double>(shape.seq_kv);
  const Group group{heads / kv_heads, queries, keys, queries / parts, keys / parts};
  const auto width = static_cast<double>(shape.dim_qk + shape.dim_v);
  if (parts <= group.query_heads && shape.seq_q == shape.seq_kv) return width * groups * group.most_keys();
  const double needed = groups * group.cells() / parts;
  const auto covered_by = [&](double full) { return full * group.cells() + (groups - full) * group.covered(0); };
  double full = 0;  // groups of which the rank holds everything
  while (full + 1 < groups && covered_by(full + 1) < needed) ++full;
  double few = 0, enough = group.capacity();
  constexpr int kHalvings = 60;
  for (int i = 0; i < kHalvings; ++i) {
    const double rows = (few + enough) / 2;
    const double cells = covered_by(full) - group.covered(0) + group.covered(rows);
    (cells >= needed ? enough : few) = rows;
  }
  return width * (full * group.capacity() + enough);
}

double lower_bound_bytes(const AttentionShape& shape, const MeshShape& mesh) {
  return lower_bound_elements(shape, mesh.sequence_parts(), mesh.size(Axis::kTensor)) *
         static_cast<double>(size_of(shape.dtype));
}

}  // namespace dattn
