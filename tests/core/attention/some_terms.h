// Score terms for the tests of every kernel, and shards of a problem to try them on.
#pragma once

#include <cmath>
#include <functional>

#include <fmt/format.h>

#include "tests/core/attention/problem.h"

namespace dattn::testing {

inline std::vector<double> slopes_of(std::int64_t heads) {
  std::vector<double> slopes;
  for (std::int64_t h = 0; h < heads; ++h) slopes.push_back(std::exp2(-1.0 - static_cast<double>(h)));
  return slopes;
}

// Calls check(problem, what) for a problem under each term alone, and under all of them.
inline void for_each_term(const Problem& p, std::int64_t positions, const std::string& what,
                          const std::function<void(const Problem&, const std::string&)>& check) {
  const std::int64_t all_heads = p.map.q_begin + p.heads;
  const AttentionDropout dropout{0.2, 77, 5, 3, all_heads};
  const auto with = [&](const auto& set, const char* name) {
    Problem one = p;
    set(one);
    check(one, fmt::format("{}, {}", what, name));
  };
  const Shape full{p.batch, p.seq_q, p.heads, positions}, shared{1, p.seq_q, 1, positions};
  with([&](Problem& x) { x.softcap = 1.5; }, "softcap");
  with([&](Problem& x) { x.slopes = slopes_of(all_heads); }, "alibi");
  with([&](Problem& x) { x.bias = full; }, "bias");
  with([&](Problem& x) { x.bias = shared; }, "one bias for all heads");
  with([&](Problem& x) { x.dropout = dropout; }, "dropout");
  with(
      [&](Problem& x) {
        x.softcap = 1.5;
        x.slopes = slopes_of(all_heads);
        x.bias = {1, p.seq_q, p.heads, positions};
        x.fp32_bias = true;
        x.dropout = dropout;
      },
      "everything");
}

// Two query heads to a KV head, of shards that hold these of `positions` positions.
inline Problem placed(const Mask& mask, const Positions& queries, const Positions& keys, std::int64_t positions,
                      std::int64_t kv_heads, std::int64_t dim_qk, std::int64_t dim_v) {
  Problem p = make_problem(queries.count(), keys.count(), 2 * kv_heads, kv_heads, dim_qk, dim_v, Mask::full());
  p.tiles = make_tiles(compile(mask, positions, positions), queries, keys);
  return p;
}

}  // namespace dattn::testing
