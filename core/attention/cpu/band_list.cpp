#include "core/attention/cpu/band_list.h"

#include <algorithm>
#include <optional>

namespace dattn::cpu {
namespace {

// Bounds that cut nothing stay far outside, but small enough for the kernels to add rows to them.
constexpr std::int64_t kFar = std::int64_t{1} << 41;

bool same_keys(const Tile& a, const Tile& b) {
  return a.step == b.step && a.k_position - a.rows.k.begin * a.step == b.k_position - b.rows.k.begin * b.step;
}

// The step of the queries if tile `next` of one row continues tile `last` of one row; nothing otherwise.
std::optional<std::int64_t> step_between(const Tile& last, const Tile& next) {
  const std::int64_t rows = next.rows.q.begin - last.rows.q.begin, positions = next.q_position - last.q_position;
  if (next.rows.q.count() != 1 || next.region != last.region || !same_keys(last, next)) return std::nullopt;
  if (rows <= 0 || positions <= 0 || positions % rows != 0) return std::nullopt;
  return positions / rows;
}

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
                   bool invariant)
    : block_rows_(block_rows), first_key_(first_key), blocks_(static_cast<std::size_t>((seq_q + block_rows - 1) / block_rows)) {
  if (!invariant) {
    for (const Tile& tile : tiles) add(tile);
    return;
  }
  std::vector<Tile> sorted(tiles.begin(), tiles.end());
  std::stable_sort(sorted.begin(), sorted.end(), [](const Tile& a, const Tile& b) { return a.region < b.region; });
  for (std::size_t i = 0, next = 0; i < sorted.size(); i = next) {
    next = i + 1;
    const bool may_join = sorted[i].rows.q.count() == 1 && next < sorted.size();
    const auto step = may_join ? step_between(sorted[i], sorted[next]) : std::nullopt;
    while (step && next < sorted.size() && step_between(sorted[next - 1], sorted[next]) == step) ++next;
    if (next - i > 1)
      add_joined(std::span(sorted).subspan(i, next - i), *step);
    else
      add(sorted[i]);
  }
}

void BandList::add(const Tile& tile) {
  for (std::int64_t block = tile.rows.q.begin / block_rows_; block * block_rows_ < tile.rows.q.end; ++block) {
    const std::int64_t first_row = block * block_rows_;
    const auto part = restrict_to(tile.rows, {first_row, first_row + block_rows_}, tile.rows.k);
    if (!part) continue;
    const Region local = shift(*part, -first_row, -first_key_);
    Band band{};
    band.row_begin = local.q.begin;
    band.row_end = local.q.end;
    band.k_begin = local.k.begin;
    band.k_end = local.k.end;
    band.lo = std::max(local.lo, -kFar);
    band.hi = std::min(local.hi, kFar);
    band.q_position = tile.q_position + (part->q.begin - tile.rows.q.begin) * tile.step;
    band.k_position = tile.k_position + (part->k.begin - tile.rows.k.begin) * tile.step;
    band.q_step = band.k_step = tile.step;
    blocks_[static_cast<std::size_t>(block)].push_back(band);
  }
}

void BandList::add_joined(std::span<const Tile> rows, std::int64_t q_step) {
  const std::int64_t first = rows.front().rows.q.begin, count = rows.back().rows.q.begin + 1 - first;
  auto& ranges = ranges_.emplace_back(std::make_unique<KeyRange[]>(static_cast<std::size_t>(count)));
  std::int64_t row = 0;
  for (const Tile& tile : rows) {  // rows between tiles see nothing
    for (; row < tile.rows.q.begin - first; ++row) ranges[row] = {ranges[row - 1].end, ranges[row - 1].end};
    ranges[row++] = {tile.rows.k.begin, tile.rows.k.end};
  }
  const KeyRange keys{ranges[0].begin, ranges[count - 1].end};
  for (std::int64_t block = first / block_rows_; block * block_rows_ < first + count; ++block) {
    const std::int64_t begin = std::max(first, block * block_rows_), end = std::min(first + count, (block + 1) * block_rows_);
    Band band{};
    band.row_begin = begin - block * block_rows_;
    band.row_end = end - block * block_rows_;
    band.k_begin = keys.begin - first_key_;
    band.k_end = keys.end - first_key_;
    band.lo = -kFar;
    band.hi = kFar;
    band.q_position = rows.front().q_position + (begin - first) * q_step;
    band.k_position = rows.front().k_position;
    band.q_step = q_step;
    band.k_step = rows.front().step;
    band.ranges = ranges.get() + (begin - first);
    band.first_key = first_key_;
    if (const auto cut = cut_ranges(band, 0, band.k_end)) blocks_[static_cast<std::size_t>(block)].push_back(*cut);
  }
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

}  // namespace dattn::cpu
