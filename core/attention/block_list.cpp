#include "core/attention/block_list.h"

#include <algorithm>
#include <array>
#include <numeric>

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

Region transposed(const Region& region) { return {region.k, region.q, -region.hi, -region.lo}; }

// Builds the list, one block of rows after the other. A part of a block (one tile's rows in it) is cut along the columns into
// blocks that all its rows see whole, as two changes of the set of rows that do, and the others, as patches.
class Builder {
 public:
  Builder(std::int64_t rows, int block_rows) : rows_(rows) {
    list_.block_rows = block_rows;
    list_.offsets.push_back(0);
  }

  void add_block(std::int64_t first_row, std::span<const Region> regions) {
    first_row_ = first_row;
    count_ = static_cast<int>(std::min<std::int64_t>(list_.block_rows, rows_ - first_row));
    changes_.clear();
    patches_.clear();
    patch_words_.clear();
    for (const Region& region : regions) {
      if (const auto part = restrict_to(region, {first_row, first_row + count_}, region.k)) add_part(*part);
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

  void add_part(const Region& part) {
    const auto begin_of = [&](std::int64_t row) { return std::max(part.k.begin, row + part.lo); };
    const auto end_of = [&](std::int64_t row) { return std::min(part.k.end, row + part.hi + 1); };
    const std::int64_t first = part.k.begin / kBlockColumns, last = (part.k.end + kBlockColumns - 1) / kBlockColumns;
    // Begins and ends ascend with the rows.
    const std::int64_t whole = (begin_of(part.q.end - 1) + kBlockColumns - 1) / kBlockColumns;
    const std::int64_t whole_end = end_of(part.q.begin) / kBlockColumns;
    const bool any_whole = whole < whole_end;
    if (any_whole) {
      const RowSet rows = row_set(part.q.begin - first_row_, part.q.end - first_row_);
      changes_.push_back({whole, rows});
      changes_.push_back({whole_end, rows});
    }
    for (std::int64_t block = first; block < last; ++block) {
      if (any_whole && block == whole) block = whole_end;
      if (block >= last) break;
      const std::size_t words = patch_words_.size();
      patches_.push_back({block, words});
      patch_words_.resize(words + static_cast<std::size_t>(list_.block_rows));
      const std::int64_t column = block * kBlockColumns;
      for (std::int64_t row = part.q.begin; row < part.q.end; ++row) {
        patch_words_[words + static_cast<std::size_t>(row - first_row_)] = bits(
            std::clamp<std::int64_t>(begin_of(row) - column, 0, 64), std::clamp<std::int64_t>(end_of(row) - column, 0, 64));
      }
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

  // The mask's number: one of the last few that is equal, or a new one.
  std::int32_t number_of(const std::array<std::uint64_t, kMaxRows>& words) {
    const auto rows = static_cast<std::size_t>(list_.block_rows), masks = list_.masks.size() / rows;
    const auto mask_end = words.begin() + list_.block_rows;
    for (std::size_t i = masks; i > 0 && i + kRemembered > masks; --i) {
      if (std::equal(words.begin(), mask_end, list_.masks.begin() + static_cast<std::ptrdiff_t>((i - 1) * rows)))
        return static_cast<std::int32_t>(i - 1);
    }
    list_.masks.insert(list_.masks.end(), words.begin(), mask_end);
    return static_cast<std::int32_t>(masks);
  }

  static constexpr std::size_t kRemembered = 4;

  BlockList list_;
  std::int64_t rows_, first_row_ = 0;
  int count_ = 0;  // rows of this block
  std::vector<Change> changes_;
  std::vector<Patch> patches_;
  std::vector<std::uint64_t> patch_words_;
};

}  // namespace

BlockList make_block_list(std::span<const Tile> tiles, std::int64_t rows, int block_rows, bool by_key) {
  const auto blocks = static_cast<std::size_t>((rows + block_rows - 1) / block_rows);
  // Which tiles touch which block: a count, then the tiles themselves.
  std::vector<std::size_t> ends(blocks + 1);
  const auto each_block = [&](const auto& body) {
    for (const Tile& tile : tiles) {
      const Region region = by_key ? transposed(tile.rows) : tile.rows;
      if (region.q.begin >= region.q.end) continue;
      const auto last = static_cast<std::size_t>((region.q.end - 1) / block_rows);
      for (auto block = static_cast<std::size_t>(region.q.begin / block_rows); block <= last; ++block) body(block, region);
    }
  };
  each_block([&](std::size_t block, const Region&) { ++ends[block + 1]; });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<Region> regions(ends.back());
  std::vector<std::size_t> next(ends.begin(), ends.end() - 1);
  each_block([&](std::size_t block, const Region& region) { regions[next[block]++] = region; });
  Builder builder(rows, block_rows);
  for (std::size_t block = 0; block < blocks; ++block) {
    builder.add_block(static_cast<std::int64_t>(block) * block_rows,
                      std::span(regions).subspan(ends[block], ends[block + 1] - ends[block]));
  }
  return builder.finish();
}

}  // namespace dattn
