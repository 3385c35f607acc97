// Tiles as the kernels read them: bands, by block of query rows.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/attention/cpu/ops.h"
#include "core/attention/tile.h"

namespace dattn::cpu {

// Rows of a band count from the first row of its block of `block_rows` query rows, keys from `first_key`.
//
// Bands stand in the order of the tiles; in invariant lists, which do not depend on how rows were cut into shards, in that of
// the regions of the mask they come from. Of the tiles a list takes what lies in the key rows `keys`.
class BandList {
 public:
  BandList(std::span<const Tile> tiles, std::int64_t seq_q, std::int64_t block_rows, std::int64_t first_key, bool invariant,
           Interval keys = {0, kMaxPosition});

  std::int64_t blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
  const std::vector<Band>& block(std::int64_t index) const { return blocks_[static_cast<std::size_t>(index)]; }
  std::int64_t area(std::int64_t block) const { return areas_[static_cast<std::size_t>(block)]; }  // visible pairs
  // The bands of a block inside the keys [begin, end), with keys counted from `begin`.
  void in_range(std::int64_t block, std::int64_t begin, std::int64_t end, std::vector<Band>& bands) const;

 private:
  void add(const Tile& tile, Interval keys);
  const KeyRange* add_ranges(const Tile& stairs);  // what each of its rows sees

  std::int64_t block_rows_, first_key_;
  std::vector<std::vector<Band>> blocks_;
  std::vector<std::int64_t> areas_;
  std::vector<std::unique_ptr<KeyRange[]>> ranges_;  // what Band::ranges points to
};

// One block of one of several lists.
struct ListedBlock {
  std::int64_t list, block;
};
// Every block of every list, those of the greatest areas first.
std::vector<ListedBlock> heaviest_first(std::span<const BandList> lists);

}  // namespace dattn::cpu
