#include "core/attention/cpu/band_list.h"

#include <algorithm>
#include <optional>

namespace dattn::cpu {
namespace {

// Bounds that cut nothing stay far outside, but small enough for the kernels to add rows to them.
constexpr std::int64_t kFar = std::int64_t{1} << 41;

// The part of a band with ranges that sees keys in [begin, end), keys counted from `begin`.
std::optional<Band> cut_ranges(Band band, std::int64_t begin, std::int64_t end) {
  const auto sees = [&](std::int64_t row) {
    const KeyRange range = band.ranges[row - band.row_begin];
    return std::max({range.begin - band.first_key, band.k_begin, begin}) <
           std::min({range.end - band.first_key, band.k_end, end});
  };
  std::int64_t first = band.row_begin, last = band.row_end;
  while (first < last && !sees(first)) ++first;
  while (first < last && !sees(last - 1)) --last;
  if (first == last) return std::nullopt;
  band.q_position += (first - band.row_begin) * band.q_step;
  band.ranges += first - band.row_begin;
  band.row_begin = first;
  band.row_end = last;
  const std::int64_t old_begin = band.k_begin;
  band.k_begin = std::max({band.k_begin, begin, band.ranges[0].begin - band.first_key});
  band.k_end = std::min({band.k_end, end, band.ranges[last - 1 - first].end - band.first_key}) - begin;
  band.k_position += (band.k_begin - old_begin) * band.k_step;
  band.k_begin -= begin;
  band.first_key += begin;
  return band;
}

}  // namespace

BandList::BandList(std::span<const Tile> tiles, std::int64_t seq_q, std::int64_t block_rows, std::int64_t first_key,
                   bool invariant, Interval keys)
    : block_rows_(block_rows),
      first_key_(first_key),
      blocks_(static_cast<std::size_t>((seq_q + block_rows - 1) / block_rows)),
      areas_(blocks_.size()) {
  std::vector<const Tile*> order;
  order.reserve(tiles.size());
  for (const Tile& tile : tiles) order.push_back(&tile);
  const auto before = [](const Tile* a, const Tile* b) { return a->region < b->region; };
  if (invariant) std::stable_sort(order.begin(), order.end(), before);
  for (const Tile* tile : order) add(*tile, keys);
}

void BandList::add(const Tile& tile, Interval keys) {
  const KeyRange* ranges = tile.stairs() ? add_ranges(tile) : nullptr;
  for (std::int64_t block = tile.rows.q.begin / block_rows_; block * block_rows_ < tile.rows.q.end; ++block) {
    const std::int64_t first_row = block * block_rows_;
    const auto part = restrict_to(tile, {first_row, first_row + block_rows_}, keys);
    if (!part) continue;
    areas_[static_cast<std::size_t>(block)] += dattn::area(*part);
    const Region local = shift(part->rows, -first_row, -first_key_);
    Band band{};
    band.row_begin = local.q.begin;
    band.row_end = local.q.end;
    band.k_begin = local.k.begin;
    band.k_end = local.k.end;
    band.lo = std::max(local.lo, -kFar);
    band.hi = std::min(local.hi, kFar);
    band.q_position = part->q_position;
    band.k_position = part->k_position;
    band.q_step = part->q_step;
    band.k_step = part->k_step;
    if (part->stairs()) {
      band.ranges = ranges + (part->rows.q.begin - tile.rows.q.begin);
      band.first_key = first_key_;
    }
    blocks_[static_cast<std::size_t>(block)].push_back(band);
  }
}

const KeyRange* BandList::add_ranges(const Tile& stairs) {
  auto& ranges = ranges_.emplace_back(std::make_unique<KeyRange[]>(static_cast<std::size_t>(stairs.rows.q.count())));
  for (std::int64_t row = stairs.rows.q.begin; row < stairs.rows.q.end; ++row) {
    const Interval keys = keys_of(stairs, row);
    ranges[static_cast<std::size_t>(row - stairs.rows.q.begin)] = {keys.begin, keys.end};
  }
  return ranges.get();
}

void BandList::in_range(std::int64_t block, std::int64_t begin, std::int64_t end, std::vector<Band>& bands) const {
  bands.clear();
  for (const Band& band : this->block(block)) {
    if (band.ranges != nullptr) {
      if (const auto cut = cut_ranges(band, begin, end)) bands.push_back(*cut);
      continue;
    }
    const Region region{{band.row_begin, band.row_end}, {band.k_begin, band.k_end}, band.lo, band.hi};
    const auto part = restrict_to(region, region.q, {begin, end});
    if (!part) continue;
    Band cut = band;
    cut.row_begin = part->q.begin;
    cut.row_end = part->q.end;
    cut.k_begin = part->k.begin - begin;
    cut.k_end = part->k.end - begin;
    cut.lo = std::max(part->lo - begin, -kFar);
    cut.hi = std::min(part->hi - begin, kFar);
    cut.q_position += (part->q.begin - band.row_begin) * band.q_step;
    cut.k_position += (part->k.begin - band.k_begin) * band.k_step;
    bands.push_back(cut);
  }
}

std::vector<ListedBlock> heaviest_first(std::span<const BandList> lists) {
  std::vector<ListedBlock> order;
  for (std::size_t list = 0; list < lists.size(); ++list) {
    for (std::int64_t block = 0; block < lists[list].blocks(); ++block)
      order.push_back({static_cast<std::int64_t>(list), block});
  }
  const auto area_of = [&](const ListedBlock& at) { return lists[static_cast<std::size_t>(at.list)].area(at.block); };
  std::stable_sort(order.begin(), order.end(),
                   [&](const ListedBlock& a, const ListedBlock& b) { return area_of(a) > area_of(b); });
  return order;
}

}  // namespace dattn::cpu
