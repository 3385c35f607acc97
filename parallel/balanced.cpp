// Layout balanced: blocks of query rows, shared out so that all parts see as many pairs of a mask and hold as many rows.
#include <algorithm>
#include <functional>
#include <queue>
#include <tuple>

#include "parallel/layout.h"

namespace dattn {
namespace {

constexpr double kEvenEnough = 0.98;                                  // mean over most pairs of a part
constexpr std::int64_t kMostPieces = 64, kMostPiecesInAll = 1 << 18;  // a part, of all parts
constexpr std::int64_t kLeastBlocks = 8;  // a part: with fewer, parts whose heavy blocks are cut would hold very unequal rows
constexpr int kMostExchanges = 64;

struct RowBlock {
  Interval rows;
  double area = 0;  // pairs that its rows see, of all batch rows
};

struct Part {
  std::vector<RowBlock> blocks;
  double area = 0;
};

std::vector<RowBlock> cut(Interval rows, std::int64_t pieces) {
  std::vector<RowBlock> blocks;
  for (std::int64_t i = 0; i < pieces; ++i) {
    const Interval piece = split_evenly(rows.count(), pieces, i);
    blocks.push_back({{rows.begin + piece.begin, rows.begin + piece.end}});
  }
  return blocks;
}

// Over all batch rows. Blocks are in ascending order.
void count_areas(const CompiledMask& mask, std::vector<RowBlock>& blocks) {
  const auto ends_before = [](std::int64_t row, const RowBlock& block) { return row < block.rows.end; };
  for (const BatchRegions& part : mask) {
    for (const Region& region : part.regions) {
      auto block = std::upper_bound(blocks.begin(), blocks.end(), region.q.begin, ends_before);
      for (; block != blocks.end() && block->rows.begin < region.q.end; ++block) {
        const auto inside = restrict_to(region, block->rows, region.k);
        if (inside) block->area += static_cast<double>(area(*inside)) * static_cast<double>(part.batch.count());
      }
    }
  }
}

// Gives every part as many of the blocks, or one less: the heaviest first, to the lightest part that has room.
void share_out(std::vector<RowBlock> blocks, std::vector<Part>& parts) {
  std::stable_sort(blocks.begin(), blocks.end(), [](const RowBlock& a, const RowBlock& b) { return a.area > b.area; });
  using Lightest = std::tuple<double, std::size_t, std::size_t>;  // area, blocks given, part
  std::priority_queue<Lightest, std::vector<Lightest>, std::greater<>> open;
  for (std::size_t i = 0; i < parts.size(); ++i) open.push({parts[i].area, 0, i});
  const std::size_t most = (blocks.size() + parts.size() - 1) / parts.size();
  std::size_t may_be_full = blocks.size() % parts.size() == 0 ? parts.size() : blocks.size() % parts.size();
  for (const RowBlock& block : blocks) {
    while (std::get<1>(open.top()) + 1 == most && may_be_full == 0) open.pop();
    const auto [lightest, given, index] = open.top();
    open.pop();
    Part& part = parts[index];
    part.blocks.push_back(block);
    part.area += block.area;
    if (given + 1 < most)
      open.push({part.area, given + 1, index});
    else
      --may_be_full;
  }
}

// Exchanges a block of the heaviest part for a lighter one, of as many rows, of the lightest part: the exchange that leaves the
// two most even. Returns false where none helps.
bool exchange_blocks(std::vector<Part>& parts) {
  const auto [lightest, heaviest] =
      std::minmax_element(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.area < b.area; });
  double best = heaviest->area, best_moved = 0;  // best: the larger of the two areas after the exchange
  RowBlock *give = nullptr, *take = nullptr;
  for (RowBlock& mine : heaviest->blocks) {
    for (RowBlock& theirs : lightest->blocks) {
      const double moved = mine.area - theirs.area;
      const double after = std::max(heaviest->area - moved, lightest->area + moved);
      if (after >= best || std::abs(mine.rows.count() - theirs.rows.count()) > 1) continue;
      best = after, best_moved = moved, give = &mine, take = &theirs;
    }
  }
  if (give == nullptr) return false;
  std::swap(*give, *take);
  heaviest->area -= best_moved;
  lightest->area += best_moved;
  return true;
}

// The pieces first: what is light then evens out what they leave.
std::vector<Part> share_out(const std::vector<RowBlock>& pieces, const std::vector<RowBlock>& blocks, std::size_t parts) {
  std::vector<Part> shares(parts);
  if (!pieces.empty()) share_out(pieces, shares);
  if (!blocks.empty()) share_out(blocks, shares);
  for (int i = 0; i < kMostExchanges && exchange_blocks(shares); ++i) {
  }
  return shares;
}

// Mean over most pairs of a part.
double evenness(const std::vector<Part>& parts) {
  double most = 0, sum = 0;
  for (const Part& part : parts) most = std::max(most, part.area), sum += part.area;
  return most == 0 ? 1.0 : sum / static_cast<double>(parts.size()) / most;
}

// Where whole blocks are too heavy to be shared out evenly (the first queries of a global mask see every key), those above the
// average are cut into pieces, finer and finer.
std::vector<Part> balanced_parts(const CompiledMask& mask, const std::vector<RowBlock>& blocks, std::size_t parts) {
  std::vector<Part> best = share_out({}, blocks, parts);
  double sum = 0;
  std::vector<RowBlock> heavy, light;
  for (const RowBlock& block : blocks) sum += block.area;
  for (const RowBlock& block : blocks) {
    const bool divides = block.area > sum / static_cast<double>(blocks.size()) && block.rows.count() > 1;
    (divides ? heavy : light).push_back(block);
  }
  const auto most_pieces = std::min(kMostPieces * static_cast<std::int64_t>(parts), kMostPiecesInAll),
             heavies = static_cast<std::int64_t>(heavy.size());
  for (std::int64_t finer = 2; evenness(best) < kEvenEnough && heavies > 0 && finer * heavies <= most_pieces; finer *= 2) {
    std::vector<RowBlock> pieces;
    bool single_rows = true;
    for (const RowBlock& block : heavy) {
      const std::int64_t count = std::min(finer, block.rows.count());
      single_rows = single_rows && count == block.rows.count();
      for (const RowBlock& piece : cut(block.rows, count)) pieces.push_back(piece);
    }
    count_areas(mask, pieces);
    std::vector<Part> shares = share_out(pieces, light, parts);
    if (evenness(shares) > evenness(best)) best = std::move(shares);
    if (single_rows) break;
  }
  return best;
}

}  // namespace

std::vector<Positions> balanced_positions(const CompiledMask& mask, std::int64_t length, int parts) {
  const std::int64_t a_part = std::clamp(kBalancedBlocksInAll / parts, kLeastBlocks, kBalancedBlocks);
  std::vector<RowBlock> blocks = cut({0, length}, std::min(length, a_part * parts));
  if (blocks.empty()) return std::vector<Positions>(static_cast<std::size_t>(parts));
  count_areas(mask, blocks);
  std::vector<Positions> positions;
  for (const Part& part : balanced_parts(mask, blocks, static_cast<std::size_t>(parts))) {
    std::vector<Interval> rows;
    for (const RowBlock& block : part.blocks) rows.push_back(block.rows);
    std::vector<Run> runs;
    for (const Interval& range : join(std::move(rows))) runs.push_back({range.begin, range.count(), 1});
    positions.emplace_back(runs);
  }
  return positions;
}

}  // namespace dattn
