#include "core/attention/block_list.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "core/base/error.h"

namespace dattn {
namespace {

constexpr int kMaxRows = 128;
constexpr std::uint64_t kAll = ~std::uint64_t{0};

using RowSet = std::array<std::uint64_t, kMaxRows / 64>;

std::uint64_t bits(std::int64_t begin, std::int64_t end) {  // of 64
  if (begin >= end) return 0;
  return (end >= 64 ? kAll : (std::uint64_t{1} << end) - 1) & (kAll << begin);
}

RowSet row_set(std::int64_t begin, std::int64_t end) {
  RowSet set{};
  for (std::size_t i = 0; i < set.size(); ++i) {
    const std::int64_t first = static_cast<std::int64_t>(i) * 64;
    set[i] = bits(std::clamp<std::int64_t>(begin - first, 0, 64), std::clamp<std::int64_t>(end - first, 0, 64));
  }
  return set;
}

bool holds(const RowSet& set, int row) { return (set[static_cast<std::size_t>(row) / 64] >> (row % 64) & 1) != 0; }

// Builds the list, one block of rows after the other. A part of a block (one tile's rows in it) is cut along the columns into
// blocks that all its rows see whole, as two changes of the set of rows that do, and the others, as patches.
class Builder {
 public:
  Builder(std::int64_t rows, int block_rows) : rows_(rows) {
    list_.block_rows = block_rows;
    list_.offsets.push_back(0);
  }

  void add_block(std::int64_t first_row, std::span<const Tile* const> tiles) {
    first_row_ = first_row;
    count_ = static_cast<int>(std::min<std::int64_t>(list_.block_rows, rows_ - first_row));
    changes_.clear();
    patches_.clear();
    patch_words_.clear();
    for (const Tile* tile : tiles) {
      if (const auto part = restrict_to(*tile, {first_row, first_row + count_}, tile->rows.k)) add_part(*part);
    }
    emit_pieces();
    list_.offsets.push_back(static_cast<std::int32_t>(list_.pieces.size()));
  }

  BlockList finish() {
    const auto blocks = list_.offsets.size() - 1;
    std::vector<std::int64_t> work(blocks);
    for (std::size_t i = 0; i < blocks; ++i) {
      for (auto p = list_.offsets[i]; p < list_.offsets[i + 1]; ++p) {
        const BlockPiece& piece = list_.pieces[static_cast<std::size_t>(p)];
        work[i] += piece.end - piece.begin;
      }
    }
    list_.order.resize(blocks);
    std::iota(list_.order.begin(), list_.order.end(), 0);
    std::stable_sort(list_.order.begin(), list_.order.end(), [&](std::int32_t a, std::int32_t b) {
      return work[static_cast<std::size_t>(a)] > work[static_cast<std::size_t>(b)];
    });
    return std::move(list_);
  }

 private:
  struct Change {
    std::int64_t block;
    RowSet rows;  // that begin, or cease, to see whole blocks
  };
  struct Patch {
    std::int64_t block;
    std::size_t words;  // where its rows are in patch_words_
  };

  void add_part(const Tile& part) {
    const Interval rows{part.rows.q.begin - first_row_, part.rows.q.end - first_row_};  // of this block
    std::array<Interval, kMaxRows> seen;
    for (std::int64_t row = rows.begin; row < rows.end; ++row)
      seen[static_cast<std::size_t>(row)] = keys_of(part, first_row_ + row);
    // Begins and ends ascend with the rows.
    const std::int64_t whole = div_up(seen[static_cast<std::size_t>(rows.end - 1)].begin, kBlockColumns);
    const std::int64_t whole_end = seen[static_cast<std::size_t>(rows.begin)].end / kBlockColumns;
    if (whole < whole_end) {
      const RowSet set = row_set(rows.begin, rows.end);
      changes_.push_back({whole, set});
      changes_.push_back({whole_end, set});
    }
    std::int64_t block = 0;  // those before it are done
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const Interval columns = seen[static_cast<std::size_t>(row)];
      for (block = std::max(block, columns.begin / kBlockColumns); block * kBlockColumns < columns.end; ++block) {
        if (block >= whole && block < whole_end) {
          block = whole_end - 1;
          continue;
        }
        add_patch(block, rows, seen);
      }
    }
  }

  void add_patch(std::int64_t block, Interval rows, const std::array<Interval, kMaxRows>& seen) {
    const std::size_t words = patch_words_.size();
    patches_.push_back({block, words});
    patch_words_.resize(words + static_cast<std::size_t>(list_.block_rows));
    const std::int64_t column = block * kBlockColumns;
    for (auto row = static_cast<std::size_t>(rows.begin); row < static_cast<std::size_t>(rows.end); ++row) {
      patch_words_[words + row] = bits(std::clamp<std::int64_t>(seen[row].begin - column, 0, 64),
                                       std::clamp<std::int64_t>(seen[row].end - column, 0, 64));
    }
  }

  // Walks over the columns from one change to the next.
  void emit_pieces() {
    const auto by_block = [](const auto& a, const auto& b) { return a.block < b.block; };
    std::stable_sort(changes_.begin(), changes_.end(), by_block);
    std::stable_sort(patches_.begin(), patches_.end(), by_block);
    RowSet whole{};
    std::size_t change = 0, patch = 0;
    std::int64_t block = 0;
    while (change < changes_.size() || patch < patches_.size()) {
      std::int64_t next = change < changes_.size() ? changes_[change].block : INT64_MAX;
      if (patch < patches_.size()) next = std::min(next, patches_[patch].block);
      if (next > block) emit(block, next, whole, {});
      block = next;
      for (; change < changes_.size() && changes_[change].block == block; ++change) {
        for (std::size_t i = 0; i < whole.size(); ++i) whole[i] ^= changes_[change].rows[i];
      }
      const std::size_t first = patch;
      while (patch < patches_.size() && patches_[patch].block == block) ++patch;
      if (patch == first) continue;
      emit(block, block + 1, whole, std::span(patches_).subspan(first, patch - first));
      ++block;
    }
  }

  void emit(std::int64_t begin, std::int64_t end, const RowSet& whole, std::span<const Patch> patches) {
    if (patches.empty() && whole == RowSet{}) return;
    std::array<std::uint64_t, kMaxRows> words{};
    bool full = true;
    for (int row = 0; row < count_; ++row) {
      auto& word = words[static_cast<std::size_t>(row)];
      if (holds(whole, row)) word = kAll;
      for (const Patch& patch : patches) word |= patch_words_[patch.words + static_cast<std::size_t>(row)];
      full = full && word == kAll;
    }
    const std::int32_t mask = full ? -1 : number_of(words);
    const auto first = static_cast<std::size_t>(list_.offsets.back());
    if (list_.pieces.size() > first && list_.pieces.back().end == begin && list_.pieces.back().mask == mask)
      list_.pieces.back().end = static_cast<std::int32_t>(end);
    else
      list_.pieces.push_back({static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end), mask});
  }

  // The mask's number: that of an equal one, unless another with its hash came between, or a new one.
  std::int32_t number_of(const std::array<std::uint64_t, kMaxRows>& words) {
    const auto mask_end = words.begin() + list_.block_rows;
    std::uint64_t hash = 0;
    for (auto word = words.begin(); word != mask_end; ++word) hash = (hash ^ (hash >> 32) ^ *word) * 0x9e3779b97f4a7c15u;
    std::int32_t& known = known_[hash >> (64 - kHashBits)];
    const auto at = [&](std::int32_t mask) { return list_.masks.begin() + std::ptrdiff_t{mask} * list_.block_rows; };
    if (known >= 0 && std::equal(words.begin(), mask_end, at(known))) return known;
    known = static_cast<std::int32_t>(list_.masks.size() / static_cast<std::size_t>(list_.block_rows));
    list_.masks.insert(list_.masks.end(), words.begin(), mask_end);
    return known;
  }

  static constexpr int kHashBits = 12;

  BlockList list_;
  std::int64_t rows_, first_row_ = 0;
  int count_ = 0;  // rows of this block
  std::vector<Change> changes_;
  std::vector<Patch> patches_;
  std::vector<std::uint64_t> patch_words_;
  std::vector<std::int32_t> known_ = std::vector<std::int32_t>(1 << kHashBits, -1);  // masks by hash
};

}  // namespace

BlockList make_block_list(std::span<const Tile> tiles, std::int64_t rows, int block_rows, bool by_key) {
  std::vector<Tile> turned;
  if (by_key) {
    turned.reserve(tiles.size());
    for (const Tile& tile : tiles) turned.push_back(transposed(tile));
    tiles = turned;
  }
  const auto blocks = static_cast<std::size_t>((rows + block_rows - 1) / block_rows);
  // Which tiles touch which block: a count, then the tiles themselves.
  std::vector<std::size_t> ends(blocks + 1);
  const auto each_block = [&](const auto& body) {
    for (const Tile& tile : tiles) {
      if (tile.rows.q.begin >= tile.rows.q.end) continue;
      const auto last = static_cast<std::size_t>((tile.rows.q.end - 1) / block_rows);
      for (auto block = static_cast<std::size_t>(tile.rows.q.begin / block_rows); block <= last; ++block) body(block, tile);
    }
  };
  each_block([&](std::size_t block, const Tile&) { ++ends[block + 1]; });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<const Tile*> touching(ends.back());
  std::vector<std::size_t> next(ends.begin(), ends.end() - 1);
  each_block([&](std::size_t block, const Tile& tile) { touching[next[block]++] = &tile; });
  Builder builder(rows, block_rows);
  for (std::size_t block = 0; block < blocks; ++block) {
    builder.add_block(static_cast<std::int64_t>(block) * block_rows,
                      std::span(touching).subspan(ends[block], ends[block + 1] - ends[block]));
  }
  return builder.finish();
}

BlockList cut_into_shares(const BlockList& list, std::int32_t columns) {
  ensure(list.blocks() == 1 && columns > 0, "{} blocks of rows cut into shares of {} columns", list.blocks(), columns);
  BlockList cut{list.block_rows, {0}, {}, list.masks, {}};
  std::int32_t left = columns;  // of this share
  for (BlockPiece piece : list.pieces) {
    while (piece.begin < piece.end) {
      if (left == 0) {
        cut.offsets.push_back(static_cast<std::int32_t>(cut.pieces.size()));
        left = columns;
      }
      const std::int32_t count = std::min(left, piece.end - piece.begin);
      cut.pieces.push_back({piece.begin, piece.begin + count, piece.mask});
      piece.begin += count;
      left -= count;
    }
  }
  cut.offsets.push_back(static_cast<std::int32_t>(cut.pieces.size()));
  cut.order.resize(cut.offsets.size() - 1);
  std::iota(cut.order.begin(), cut.order.end(), 0);
  return cut;
}

std::int64_t column_blocks(const BlockList& list) {
  std::int64_t count = 0;
  for (const BlockPiece& piece : list.pieces) count += piece.end - piece.begin;
  return count;
}

}  // namespace dattn
