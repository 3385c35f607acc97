// Random regions and positions, and what they mean pair by pair.
#pragma once

#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "core/attention/mask.h"
#include "core/attention/region.h"
#include "tests/core/random.h"

namespace dattn::testing {

using Pair = std::pair<std::int64_t, std::int64_t>;
inline constexpr std::int64_t kSide = 14;  // brute force looks at positions [0, kSide)

inline std::int64_t some_bound() {
  return pick(0, 4) > 0 ? pick(-kSide - 2, kSide + 3) : *rc::gen::element(-kUnbounded, kUnbounded);
}

inline Region some_region() { return {pick_interval(kSide), pick_interval(kSide), some_bound(), some_bound()}; }

inline std::set<Pair> pairs_of(const Region& region) {
  std::set<Pair> pairs;
  for (std::int64_t q = region.q.begin; q < region.q.end; ++q) {
    for (std::int64_t k = region.k.begin; k < region.k.end; ++k) {
      if (region.contains(q, k)) pairs.emplace(q, k);
    }
  }
  return pairs;
}

inline std::set<Pair> pairs_of(const std::optional<Region>& region) { return region ? pairs_of(*region) : std::set<Pair>{}; }

// Every row and column holds a pair, and a bound that is kept cuts something off.
inline void assert_trimmed(const Region& region) {
  std::set<std::int64_t> rows, columns;
  for (const auto& [q, k] : pairs_of(region)) {
    rows.insert(q);
    columns.insert(k);
  }
  RC_ASSERT(static_cast<std::int64_t>(rows.size()) == region.q.count());
  RC_ASSERT(static_cast<std::int64_t>(columns.size()) == region.k.count());
  RC_ASSERT(region.lo == -kUnbounded || region.lo > region.k.begin - (region.q.end - 1));
  RC_ASSERT(region.hi == kUnbounded || region.hi < region.k.end - 1 - region.q.begin);
}

// Distinct positions in [0, kSide), as runs of any steps, in any order of runs.
inline Positions some_positions() {
  std::vector<Run> runs;
  std::set<std::int64_t> used;
  for (std::int64_t tries = pick(1, 5); tries > 0; --tries) {
    const Run run{pick(0, kSide), pick(1, 9), pick(1, 5)};
    bool fits = run.last() < kSide;
    for (std::int64_t row = 0; fits && row < run.count; ++row) fits = !used.contains(run.at(row));
    if (!fits) continue;
    for (std::int64_t row = 0; row < run.count; ++row) used.insert(run.at(row));
    runs.push_back(run);
  }
  return Positions(runs);
}

// Disjoint regions: cells of a grid of rectangles, each cut by a diagonal into a lower and an upper part.
inline std::vector<Region> some_disjoint_regions() {
  std::vector<Region> mask;
  const auto cut_q = pick(0, kSide + 1), cut_k = pick(0, kSide + 1);
  for (const Interval q : {Interval{0, cut_q}, Interval{cut_q, kSide}}) {
    for (const Interval k : {Interval{0, cut_k}, Interval{cut_k, kSide}}) {
      const auto diagonal = pick(-kSide, kSide + 1);
      const auto width = pick(0, 6);
      if (*rc::gen::arbitrary<bool>()) mask.push_back({q, k, -kUnbounded, diagonal});
      if (*rc::gen::arbitrary<bool>()) mask.push_back({q, k, diagonal + 1, diagonal + width});
    }
  }
  return mask;
}

// One or two runs of some hundred rows.
inline Positions some_rows() {
  const std::int64_t begin = pick(0, 90), step = pick(1, 6), count = pick(1, 200);
  if (pick(0, 2) == 0) return Positions({{begin, count, step}});
  return Positions({{begin, count, step}, {begin + count * step + pick(0, 50), pick(1, 150), pick(1, 6)}});
}

inline std::vector<Region> some_mask_of_regions() {
  std::vector<Region> regions;
  for (std::int64_t i = pick(1, 5); i > 0; --i) {
    Region region{pick_interval(1000), pick_interval(1000)};
    if (pick(0, 2) == 0) region.lo = pick(-300, 200);
    if (pick(0, 2) == 0) region.hi = std::max<std::int64_t>(region.lo, -300) + pick(0, 300);
    regions.push_back(region);
  }
  return compile(Mask::of_regions(regions, Mask::Overlap::kFirst), 1000, 1000);
}

}  // namespace dattn::testing
