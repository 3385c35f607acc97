// A tile: what a run of queries, a run of keys and a region share, in local row numbers. Where the runs have one step it is
// again a region; where they have two and a bound cuts something off, it is stairs.
//
//   equal steps    k ->       queries of step 3, keys of step 1    k ->
//             q  #...                                        q  #..........
//             |  ##..                                        |  ####.......
//             v  ###.                                        v  #######....
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/attention/positions.h"
#include "core/attention/region.h"

namespace dattn {

// Query row i is at position q_position + (i - rows.q.begin) * q_step, key row j at k_position + (j - rows.k.begin) * k_step.
struct Tile {
  Region rows;  // stairs: without bounds
  std::int64_t q_position = 0;
  std::int64_t k_position = 0;
  std::int64_t q_step = 1;
  std::int64_t k_step = 1;
  int region = 0;  // which region of the mask it is a part of
  // Stairs: those pairs of rows are visible whose positions have lo <= k - q <= hi.
  std::int64_t lo = -kUnbounded;
  std::int64_t hi = kUnbounded;

  bool stairs() const { return lo != -kUnbounded || hi != kUnbounded; }
  std::int64_t q_at(std::int64_t row) const { return q_position + (row - rows.q.begin) * q_step; }
  std::int64_t k_at(std::int64_t row) const { return k_position + (row - rows.k.begin) * k_step; }
  bool contains(std::int64_t q_row, std::int64_t k_row) const {
    if (!rows.contains(q_row, k_row)) return false;
    const std::int64_t apart = stairs() ? k_at(k_row) - q_at(q_row) : 0;
    return apart >= lo && apart <= hi;
  }
  bool operator==(const Tile&) const = default;
};

// The key rows that a query row of rows.q sees. Begins and ends ascend with the row, of empty ranges too.
Interval keys_of(const Tile& tile, std::int64_t q_row);

Tile transposed(const Tile& tile);  // queries and keys change places
// The part of a tile in ranges of its rows, trimmed as regions are; nothing where no pair is left.
std::optional<Tile> restrict_to(const Tile& tile, Interval q, Interval k);
std::int64_t area(const Tile& tile);  // visible pairs, in closed form
std::int64_t area(std::span<const Tile> tiles);

// The visible pairs of a block of queries and a block of keys, as disjoint trimmed tiles, at most one for each pair of runs
// and region; ordered by query row, then key row, then region.
std::vector<Tile> make_tiles(const RegionList& mask, const Positions& queries, const Positions& keys);

}  // namespace dattn
