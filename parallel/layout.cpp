#include "parallel/layout.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <tuple>

#include "core/base/error.h"

namespace dattn {

std::string_view name_of(Layout layout) {
  switch (layout) {
    case Layout::kContiguous: return "contiguous";
    case Layout::kZigzag: return "zigzag";
    case Layout::kStriped: return "striped";
    case Layout::kBalanced: return "balanced";
  }
  return "?";
}

Layout layout_from(std::string_view name) {
  for (const Layout layout : {Layout::kContiguous, Layout::kZigzag, Layout::kStriped, Layout::kBalanced}) {
    if (name == name_of(layout)) return layout;
  }
  fail(ErrorCode::kBadInput, "unknown layout '{}'; known: contiguous, zigzag, striped, balanced", name);
}

Positions positions_of(Layout layout, std::int64_t length, int parts, int index) {
  if (parts == 1) return Positions::range(0, length);
  switch (layout) {
    case Layout::kContiguous: {
      const Interval own = split_evenly(length, parts, index);
      return Positions::range(own.begin, own.end);
    }
    case Layout::kZigzag: {
      const Interval early = split_evenly(length, 2 * parts, index);
      const Interval late = split_evenly(length, 2 * parts, 2 * parts - 1 - index);
      return Positions({{early.begin, early.count(), 1}, {late.begin, late.count(), 1}});
    }
    case Layout::kStriped: return Positions({{index, index < length ? (length - index - 1) / parts + 1 : 0, parts}});
    case Layout::kBalanced: break;
  }
  fail(ErrorCode::kInternal, "layout balanced depends on the mask; ask the problem");
}

namespace {

struct Part {
  std::vector<std::int64_t> blocks;
  std::int64_t area = 0;
};

// Visible pairs of every block of query rows, over all batch rows.
std::vector<std::int64_t> block_areas(const CompiledMask& mask, std::int64_t length, std::int64_t blocks) {
  std::vector<std::int64_t> areas(static_cast<std::size_t>(blocks), 0);
  const std::int64_t base = length / blocks, larger = length % blocks;
  const auto block_of = [&](std::int64_t row) {
    return row < larger * (base + 1) ? row / (base + 1) : larger + (row - larger * (base + 1)) / base;
  };
  for (const BatchRegions& part : mask) {
    for (const Region& region : part.regions) {
      if (region.q.count() <= 0) continue;
      for (std::int64_t block = block_of(region.q.begin); block <= block_of(region.q.end - 1); ++block) {
        const auto inside = restrict_to(region, split_evenly(length, blocks, block), region.k);
        if (inside) areas[static_cast<std::size_t>(block)] += area(*inside) * part.batch.count();
      }
    }
  }
  return areas;
}

// Exchanges one block of the heaviest part for a lighter one of the lightest part, the exchange that leaves the two most
// even. Returns false where none helps.
bool exchange_blocks(std::vector<Part>& parts, const std::vector<std::int64_t>& areas) {
  const auto [lightest, heaviest] =
      std::minmax_element(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.area < b.area; });
  std::int64_t best = heaviest->area, best_moved = 0;  // best: the larger of the two areas after the exchange
  std::int64_t *give = nullptr, *take = nullptr;
  for (std::int64_t& mine : heaviest->blocks) {
    for (std::int64_t& theirs : lightest->blocks) {
      const std::int64_t moved = areas[static_cast<std::size_t>(mine)] - areas[static_cast<std::size_t>(theirs)];
      const std::int64_t after = std::max(heaviest->area - moved, lightest->area + moved);
      if (after < best) best = after, best_moved = moved, give = &mine, take = &theirs;
    }
  }
  if (give == nullptr) return false;
  std::swap(*give, *take);
  heaviest->area -= best_moved;
  lightest->area += best_moved;
  return true;
}

}  // namespace

std::vector<Positions> balanced_positions(const CompiledMask& mask, std::int64_t length, int parts) {
  const std::int64_t blocks = std::min<std::int64_t>(length, kBalancedBlocks * parts);
  if (blocks == 0) return std::vector<Positions>(static_cast<std::size_t>(parts));
  const std::vector<std::int64_t> areas = block_areas(mask, length, blocks);
  std::vector<std::int64_t> order(static_cast<std::size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return areas[static_cast<std::size_t>(a)] > areas[static_cast<std::size_t>(b)];
  });
  std::vector<Part> shares(static_cast<std::size_t>(parts));
  using Lightest = std::tuple<std::int64_t, std::size_t, int>;  // area, blocks, part
  std::priority_queue<Lightest, std::vector<Lightest>, std::greater<>> open;
  for (int part = 0; part < parts; ++part) open.push({0, 0, part});
  const std::int64_t larger_parts = blocks % parts == 0 ? parts : blocks % parts;  // these get one block more
  const auto most = static_cast<std::size_t>((blocks + parts - 1) / parts);
  std::int64_t full = 0;
  for (const std::int64_t block : order) {
    while (std::get<1>(open.top()) + 1 == most && full == larger_parts) open.pop();
    const int index = std::get<2>(open.top());
    open.pop();
    Part& part = shares[static_cast<std::size_t>(index)];
    part.blocks.push_back(block);
    part.area += areas[static_cast<std::size_t>(block)];
    if (part.blocks.size() < most)
      open.push({part.area, part.blocks.size(), index});
    else
      ++full;
  }
  constexpr int kMostExchanges = 64;
  for (int i = 0; i < kMostExchanges && exchange_blocks(shares, areas); ++i) {
  }
  std::vector<Positions> positions;
  for (Part& part : shares) {
    std::sort(part.blocks.begin(), part.blocks.end());
    std::vector<Interval> rows;
    for (const std::int64_t block : part.blocks) rows.push_back(split_evenly(length, blocks, block));
    std::vector<Run> runs;
    for (const Interval& range : join(std::move(rows))) runs.push_back({range.begin, range.count(), 1});
    positions.emplace_back(runs);
  }
  return positions;
}

}  // namespace dattn
