// A region: the pairs (q, k) of a rectangle of positions with lo <= k - q <= hi. Every mask compiles to disjoint
// regions. Regions are closed under restriction to rectangles, shifting and striding.
//
//        k ->                 full    lo = -inf, hi = inf
//      q #....                causal  lo = -inf, hi = 0        (drawn)
//      | ##...                window  lo = -left, hi = right
//      v ###..
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/attention/positions.h"

namespace dattn {

inline constexpr std::int64_t kUnbounded = INT64_MAX / 4;  // |lo|, |hi| at or beyond it mean no bound
inline constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

inline bool bounded(std::int64_t bound) { return bound > -kUnbounded && bound < kUnbounded; }

struct Region {
  Interval q;  // half-open
  Interval k;
  std::int64_t lo = -kUnbounded;
  std::int64_t hi = kUnbounded;

  bool contains(std::int64_t query, std::int64_t key) const {
    return query >= q.begin && query < q.end && key >= k.begin && key < k.end && key - query >= lo && key - query <= hi;
  }
  bool operator==(const Region&) const = default;
};

// The part of a region inside a rectangle; nothing where no pair is left. The result is trimmed: its ranges are the
// smallest that hold its pairs, and bounds that cut nothing are set to +-kUnbounded.
std::optional<Region> restrict_to(const Region& region, Interval q, Interval k);
Region shift(const Region& region, std::int64_t dq, std::int64_t dk);  // moved by (dq, dk)
std::int64_t area(const Region& region);                               // visible pairs, in closed form
std::optional<Region> intersect(const Region& a, const Region& b);
std::vector<Region> subtract(const Region& a,
                             const Region& b);  // the pairs of a that b lacks: at most 6 disjoint trimmed regions
std::string to_text(const Region& region);

// Regions in a fixed order, and which of them a stretch of queries can meet: found in logarithmic time where they are
// ordered by query, as compile() makes them.
class RegionList {
 public:
  RegionList() = default;
  RegionList(std::vector<Region> regions);  // NOLINT: any list of regions will do

  // Numbers [begin, end): no region outside that range holds one of the query positions.
  Interval meeting(Interval queries) const;

  const Region& operator[](std::size_t i) const { return regions_[i]; }
  std::size_t size() const { return regions_.size(); }
  bool empty() const { return regions_.empty(); }
  auto begin() const { return regions_.begin(); }
  auto end() const { return regions_.end(); }
  bool operator==(const RegionList& other) const { return regions_ == other.regions_; }

 private:
  std::vector<Region> regions_;
  std::vector<std::int64_t> latest_;    // of regions 0..i: the greatest q.end
  std::vector<std::int64_t> earliest_;  // of regions i..: the least q.begin
};

// The regions of a run of consecutive batch rows that share them.
struct BatchRegions {
  Interval batch;
  RegionList regions;
};
using CompiledMask = std::vector<BatchRegions>;  // ascending, covering [0, batch)

std::int64_t area(std::span<const Region> mask);
// Visible pairs of some queries and a range of keys, or of some keys and a range of queries; of runs of any step.
std::int64_t area(const RegionList& mask, const Positions& queries, Interval keys);
std::int64_t area(const RegionList& mask, Interval queries, const Positions& keys);

// Queries whose windows are narrower than their step leave gaps between the keys they see. The ranges of up to so many queries
// are listed one by one; those of more are joined across the gaps, of each region.
inline constexpr std::int64_t kMostSeenRanges = std::int64_t{1} << 20;

// Ascending disjoint ranges of positions that hold every key which one of the queries sees; the smallest ones, but for the gaps
// that kMostSeenRanges joins.
std::vector<Interval> seen_keys(const RegionList& mask, const Positions& queries);
std::vector<Interval> seen_keys(const CompiledMask& mask, const Positions& queries);  // by any batch row

}  // namespace dattn
