// Tiles as blocked kernels read them: for each block of rows, the blocks of 64 columns in which some pair is visible, each
// either full or with a bit a pair. The cost follows the visible area: columns that nobody sees are not listed, runs of full
// blocks are one piece, and neighbouring masks that are equal are stored once (all blocks on a diagonal are).
//
//   rows 0..63     [0, 3) full   [3, 4) mask 0
//   rows 64..127   [0, 4) full   [4, 5) mask 0        causal
//
// It holds the set of visible pairs and nothing else: how the tiles cut it leaves no trace.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/attention/tile.h"

namespace dattn {

inline constexpr int kBlockColumns = 64;

struct BlockPiece {
  std::int32_t begin, end;  // blocks of columns
  std::int32_t mask;        // number of the mask that each of them has; -1: all pairs are visible
};

struct BlockList {
  int block_rows = 0;
  std::vector<std::int32_t> offsets;  // [blocks + 1]: where the pieces of a block of rows start; they ascend
  std::vector<BlockPiece> pieces;
  std::vector<std::uint64_t> masks;  // [masks][block_rows]: bit j of a row is column j of the block; 0 past the last row
  std::vector<std::int32_t> order;   // [blocks]: those with most work first

  int blocks() const { return static_cast<int>(order.size()); }
};

// Rows and columns are the queries and keys of the tiles, or, where `by_key`, the other way round. block_rows: 64 or 128.
BlockList make_block_list(std::span<const Tile> tiles, std::int64_t rows, int block_rows, bool by_key);

// A list of one block of rows as one of several blocks, each with up to `columns` blocks of the columns it sees, ascending:
// shares of a few rows' keys for as many workers.
BlockList cut_into_shares(const BlockList& list, std::int32_t columns);
std::int64_t column_blocks(const BlockList& list);  // in which some pair is visible, over all blocks of rows

}  // namespace dattn
