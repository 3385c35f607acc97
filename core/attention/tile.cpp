#include "core/attention/tile.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace dattn {
namespace {

// The trimmed part of stairs in non-empty ranges of its rows.
std::optional<Tile> restrict_stairs(const Tile& tile, Interval q, Interval k) {
  const std::int64_t first_key = tile.k_at(k.begin), last_key = tile.k_at(k.end - 1), first = tile.rows.q.begin;
  if (bounded(tile.hi)) q.begin = std::max(q.begin, first + div_up(first_key - tile.hi - tile.q_position, tile.q_step));
  if (bounded(tile.lo)) q.end = std::min(q.end, first + div_down(last_key - tile.lo - tile.q_position, tile.q_step) + 1);
  Tile part = tile;
  part.rows.k = k;
  part.k_position = first_key;
  // What is left sees nothing only where its window falls between two keys, which repeats every so many rows.
  const std::int64_t period = tile.k_step / std::gcd(tile.q_step, tile.k_step), end = std::min(q.end, q.begin + period);
  while (q.begin < end && keys_of(part, q.begin).count() == 0) ++q.begin;
  if (q.begin >= end) return std::nullopt;
  while (keys_of(part, q.end - 1).count() == 0) --q.end;
  k = {keys_of(part, q.begin).begin, keys_of(part, q.end - 1).end};
  part.rows = {q, k};
  part.q_position = tile.q_at(q.begin);
  part.k_position = tile.k_at(k.begin);
  if (part.lo <= part.k_position - part.q_at(q.end - 1)) part.lo = -kUnbounded;
  if (part.hi >= part.k_at(k.end - 1) - part.q_position) part.hi = kUnbounded;
  return part;
}

// Sum over i in [0, n) of (a * i + b) / m, rounded down, as Euclid's algorithm goes; a, b >= 0.
std::int64_t sum_of_quotients(std::int64_t n, std::int64_t m, std::int64_t a, std::int64_t b) {
  for (std::int64_t sum = 0;;) {
    sum += n * (n - 1) / 2 * (a / m) + n * (b / m);
    a %= m;
    b %= m;
    const std::int64_t last = a * n + b;
    if (last < m) return sum;
    n = last / m;
    b = last % m;
    std::swap(m, a);
  }
}

// Pairs of stairs with k - q <= hi, in positions.
std::int64_t pairs_below(const Tile& tile, std::int64_t hi) {
  // Row i sees clamp((apart + i * q_step) / k_step + 1, 0, K) keys.
  const std::int64_t apart = tile.q_position + hi - tile.k_position;
  const Run rows{0, tile.rows.q.count(), tile.q_step};
  const auto [first, saturated] = rows.rows_inside({-apart, (tile.rows.k.count() - 1) * tile.k_step - apart});
  const std::int64_t n = saturated - first;
  return sum_of_quotients(n, tile.k_step, tile.q_step, apart + first * tile.q_step) + n +
         (rows.count - saturated) * tile.rows.k.count();
}

// The tile of one region and a pair of runs.
std::optional<Tile> tile_of(const Region& region, const Run& q, std::int64_t q_row, const Run& k, std::int64_t k_row) {
  Tile tile{{{q_row, q_row + q.count}, {k_row, k_row + k.count}}, q.begin, k.begin, q.step, k.step};
  const auto inside = [&](const Region& part) {
    const Interval q_rows = q.rows_inside(part.q), k_rows = k.rows_inside(part.k);
    return restrict_to(tile, {q_row + q_rows.begin, q_row + q_rows.end}, {k_row + k_rows.begin, k_row + k_rows.end});
  };
  if (q.step != k.step && q.count > 1 && k.count > 1) {
    const auto part = restrict_to(region, {q.begin, q.last() + 1}, {k.begin, k.last() + 1});
    if (!part) return std::nullopt;
    tile.lo = part->lo;
    tile.hi = part->hi;
    return inside(*part);
  }
  tile.q_step = tile.k_step = q.count == 1 ? k.step : q.step;
  const std::int64_t apart = k.begin - q.begin, rows_apart = k_row - q_row;  // of the first rows
  tile.rows.lo = bounded(region.lo) ? rows_apart + div_up(region.lo - apart, tile.q_step) : region.lo;
  tile.rows.hi = bounded(region.hi) ? rows_apart + div_down(region.hi - apart, tile.q_step) : region.hi;
  return inside(region);
}

}  // namespace

Interval keys_of(const Tile& tile, std::int64_t q_row) {
  Interval keys = tile.rows.k;
  if (tile.stairs()) {
    const std::int64_t apart = tile.q_at(q_row) - tile.k_position;
    if (bounded(tile.lo)) keys.begin += std::max<std::int64_t>(0, div_up(apart + tile.lo, tile.k_step));
    if (bounded(tile.hi)) keys.end = std::min(keys.end, tile.rows.k.begin + div_down(apart + tile.hi, tile.k_step) + 1);
  } else {
    keys = {std::max(keys.begin, q_row + tile.rows.lo), std::min(keys.end, q_row + tile.rows.hi + 1)};
  }
  return {keys.begin, std::max(keys.begin, keys.end)};
}

Tile transposed(const Tile& tile) {
  const Region& rows = tile.rows;
  return {{rows.k, rows.q, -rows.hi, -rows.lo},
          tile.k_position,
          tile.q_position,
          tile.k_step,
          tile.q_step,
          tile.region,
          -tile.hi,
          -tile.lo};
}

std::optional<Tile> restrict_to(const Tile& tile, Interval q, Interval k) {
  if (!tile.stairs()) {
    const auto rows = restrict_to(tile.rows, q, k);
    if (!rows) return std::nullopt;
    Tile part = tile;
    part.rows = *rows;
    part.q_position = tile.q_at(rows->q.begin);
    part.k_position = tile.k_at(rows->k.begin);
    return part;
  }
  q = {std::max(q.begin, tile.rows.q.begin), std::min(q.end, tile.rows.q.end)};
  k = {std::max(k.begin, tile.rows.k.begin), std::min(k.end, tile.rows.k.end)};
  if (q.count() <= 0 || k.count() <= 0) return std::nullopt;
  return restrict_stairs(tile, q, k);
}

std::int64_t area(const Tile& tile) {
  if (!tile.stairs()) return area(tile.rows);
  const auto part = restrict_to(tile, tile.rows.q, tile.rows.k);
  if (!part) return 0;
  if (!part->stairs()) return area(part->rows);
  const std::int64_t all = part->rows.q.count() * part->rows.k.count();
  return (bounded(part->hi) ? pairs_below(*part, part->hi) : all) - (bounded(part->lo) ? pairs_below(*part, part->lo - 1) : 0);
}

std::int64_t area(std::span<const Tile> tiles) {
  std::int64_t sum = 0;
  for (const Tile& tile : tiles) sum += area(tile);
  return sum;
}

std::vector<Tile> make_tiles(const RegionList& mask, const Positions& queries, const Positions& keys) {
  std::vector<Tile> tiles;
  for (std::size_t i = 0; i < queries.runs().size(); ++i) {
    const Run& q = queries.runs()[i];
    const Interval met = mask.meeting({q.begin, q.last() + 1});
    for (std::size_t j = 0; j < keys.runs().size(); ++j) {
      const Run& k = keys.runs()[j];
      for (std::int64_t r = met.begin; r < met.end; ++r) {
        const Region& region = mask[static_cast<std::size_t>(r)];
        if (region.q.begin > q.last() || region.q.end <= q.begin || region.k.begin > k.last() || region.k.end <= k.begin)
          continue;
        auto tile = tile_of(region, q, queries.row_of_run(i), k, keys.row_of_run(j));
        if (!tile) continue;
        tile->region = static_cast<int>(r);
        tiles.push_back(*tile);
      }
    }
  }
  const auto before = [](const Tile& a, const Tile& b) {
    return std::tuple(a.rows.q.begin, a.rows.k.begin, a.region) < std::tuple(b.rows.q.begin, b.rows.k.begin, b.region);
  };
  if (!std::is_sorted(tiles.begin(), tiles.end(), before)) std::sort(tiles.begin(), tiles.end(), before);
  return tiles;
}

}  // namespace dattn
