// A kernel call in the terms of cuDNN's attention graphs: each computes one rectangle of rows under one diagonal band, for
// query heads that share KV heads evenly. Tiles say more, so a list of tiles becomes a list of such calls, whose states are
// merged and whose gradients are added.
//
//   zigzag, own block     three tiles     one call: the band in local rows is causal again
//     #.......            #...|....
//     ##......            ##..|....
//     ###.....      <-    ----+----
//     ####....            ####|#...
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/attention/kernel.h"

namespace dattn::cudnn {

// Row i of q sees the keys j of k with i - left < j <= i + right, both counted from the begin of their ranges.
struct Band {
  Interval q;  // local rows
  Interval k;
  std::optional<std::int64_t> left;   // at least 1; none: no bound
  std::optional<std::int64_t> right;  // at least 0; none: no bound
  std::int64_t k_position = 0;        // of row k.begin
  std::int64_t step = 1;              // of the positions of keys, along the whole range where `positional`
  bool operator==(const Band&) const = default;
};

// Query heads [q.begin, q.end) read KV heads [kv.begin, kv.end), q.count() / kv.count() consecutive ones share each.
struct HeadGroup {
  Interval q;
  Interval kv;
  bool operator==(const HeadGroup&) const = default;
};

// The tiles, none of them stairs, as bands. Tiles whose union is a band are joined; `positional`: only where the positions of
// keys go on evenly too. A band with a left bound and more queries than keys, which cuDNN refuses, is cut in two.
std::vector<Band> bands_of(std::span<const Tile> tiles, bool positional);

// All local query heads, ascending; at most three groups.
std::vector<HeadGroup> head_groups(const HeadMap& heads, std::int64_t count);

// More bands than this are not for cuDNN: every shape is a plan of its own that takes about a second to build.
inline constexpr std::size_t kMostTiles = 64;
inline constexpr std::size_t kMostBands = 8;
inline constexpr std::int64_t kFewestRows = 64;  // below it, as in generation, keys grow by a row a call

// What cuDNN, on whatever device, is not asked to compute, and why.
Support suits(const AttendArgs& args);
Support suits(const AttendGradArgs& args);

}  // namespace dattn::cudnn
