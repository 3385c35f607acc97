#include "core/attention/region.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

std::int64_t shift_bound(std::int64_t bound, std::int64_t by) { return bounded(bound) ? bound + by : bound; }

// Sum over q in [q.begin, q.end) of max(0, min(k_end, q + hi + 1) - k_begin): pairs below an upper bound only.
std::int64_t area_below(Interval q, Interval k, std::int64_t hi) {
  // Row q sees clamp(q + hi + 1 - k.begin, 0, K) keys: first growing by one a row, then constant.
  const std::int64_t first_seeing = std::max(q.begin, k.begin - hi);            // sees at least one
  const std::int64_t first_saturated = std::max(first_seeing, k.end - 1 - hi);  // sees all K
  const std::int64_t ramp_end = std::min(first_saturated, q.end);
  std::int64_t sum = 0;
  if (ramp_end > first_seeing) {
    const std::int64_t n = ramp_end - first_seeing;
    const std::int64_t start = first_seeing + hi + 1 - k.begin;
    sum += n * start + n * (n - 1) / 2;
  }
  if (q.end > first_saturated) sum += (q.end - first_saturated) * k.count();
  return sum;
}

}  // namespace

std::optional<Region> restrict_to(const Region& region, Interval q, Interval k) {
  Region part = region;
  part.q = {std::max(region.q.begin, q.begin), std::min(region.q.end, q.end)};
  part.k = {std::max(region.k.begin, k.begin), std::min(region.k.end, k.end)};
  if (part.q.count() <= 0 || part.k.count() <= 0 || part.lo > part.hi) return std::nullopt;
  if (part.lo >= kUnbounded || part.hi <= -kUnbounded) return std::nullopt;  // closed by a bound that no pair reaches
  // Rows and columns that the band does not reach are cut off; each cut can only widen what the next one cuts once.
  const bool has_lo = bounded(part.lo), has_hi = bounded(part.hi);
  if (has_hi) part.q.begin = std::max(part.q.begin, part.k.begin - part.hi);
  if (has_lo) part.q.end = std::min(part.q.end, part.k.end - part.lo);
  if (part.q.count() <= 0) return std::nullopt;
  if (has_lo) part.k.begin = std::max(part.k.begin, part.q.begin + part.lo);
  if (has_hi) part.k.end = std::min(part.k.end, part.q.end + part.hi);
  if (part.k.count() <= 0) return std::nullopt;
  if (part.lo <= part.k.begin - (part.q.end - 1)) part.lo = -kUnbounded;
  if (part.hi >= part.k.end - 1 - part.q.begin) part.hi = kUnbounded;
  return part;
}

Region shift(const Region& region, std::int64_t dq, std::int64_t dk) {
  return {{region.q.begin + dq, region.q.end + dq},
          {region.k.begin + dk, region.k.end + dk},
          shift_bound(region.lo, dk - dq),
          shift_bound(region.hi, dk - dq)};
}

std::int64_t area(const Region& region) {
  const auto trimmed = restrict_to(region, region.q, region.k);
  if (!trimmed) return 0;
  // Pairs with k - q <= hi less pairs with k - q <= lo - 1.
  const std::int64_t span = trimmed->q.count() + trimmed->k.count();
  const std::int64_t highest = trimmed->k.end - 1 - trimmed->q.begin;
  const std::int64_t hi = std::min(trimmed->hi, highest);
  const std::int64_t lo = std::max(trimmed->lo, highest - span);
  return area_below(trimmed->q, trimmed->k, hi) - area_below(trimmed->q, trimmed->k, lo - 1);
}

std::optional<Region> intersect(const Region& a, const Region& b) {
  Region both = a;
  both.lo = std::max(a.lo, b.lo);
  both.hi = std::min(a.hi, b.hi);
  return restrict_to(both, b.q, b.k);
}

std::vector<Region> subtract(const Region& a, const Region& b) {
  std::vector<Region> parts;
  const auto keep = [&](const Region& region, Interval q, Interval k) {
    if (const auto part = restrict_to(region, q, k)) parts.push_back(*part);
  };
  const auto both = intersect(a, b);
  if (!both) {
    keep(a, a.q, a.k);
    return parts;
  }
  // Around the rectangle that holds what they share, then inside it below and above b's band.
  const Interval q = both->q, k = both->k;
  keep(a, {a.q.begin, q.begin}, a.k);
  keep(a, q, {a.k.begin, k.begin});
  if (bounded(b.lo)) keep({a.q, a.k, a.lo, std::min(a.hi, b.lo - 1)}, q, k);
  if (bounded(b.hi)) keep({a.q, a.k, std::max(a.lo, b.hi + 1), a.hi}, q, k);
  keep(a, q, {k.end, a.k.end});
  keep(a, {q.end, a.q.end}, a.k);
  return parts;
}

std::string to_text(const Region& region) {
  const auto bound = [](std::int64_t value) { return bounded(value) ? std::to_string(value) : std::string("null"); };
  return fmt::format("{{q: [{}, {}], k: [{}, {}], lo: {}, hi: {}}}", region.q.begin, region.q.end, region.k.begin, region.k.end,
                     bound(region.lo), bound(region.hi));
}

RegionList::RegionList(std::vector<Region> regions) : regions_(std::move(regions)) {
  latest_.resize(regions_.size());
  earliest_.resize(regions_.size());
  std::int64_t latest = INT64_MIN, earliest = INT64_MAX;
  for (std::size_t i = 0; i < regions_.size(); ++i) latest_[i] = latest = std::max(latest, regions_[i].q.end);
  for (std::size_t i = regions_.size(); i-- > 0;) earliest_[i] = earliest = std::min(earliest, regions_[i].q.begin);
}

Interval RegionList::meeting(Interval queries) const {
  const auto first = std::upper_bound(latest_.begin(), latest_.end(), queries.begin);
  const auto last = std::lower_bound(earliest_.begin(), earliest_.end(), queries.end);
  const std::int64_t begin = first - latest_.begin(), end = last - earliest_.begin();
  return {begin, std::max(begin, end)};
}

std::int64_t area(std::span<const Region> mask) {
  std::int64_t sum = 0;
  for (const Region& region : mask) sum += area(region);
  return sum;
}

namespace {

// Sum over the rows of a run of clamp(row + hi + 1 - k.begin, 0, K): what they see below an upper bound.
std::int64_t strided_below(const Run& rows, Interval k, std::int64_t hi) {
  const auto [first, saturated] = rows.rows_inside({k.begin - hi, k.end - 1 - hi});  // see at least one key, and all
  const std::int64_t n = saturated - first;
  return n * (rows.at(first) + hi + 1 - k.begin) + rows.step * (n * (n - 1) / 2) + (rows.count - saturated) * k.count();
}

// Pairs of a run of positions on one side and a range on the other, with lo <= other - own <= hi.
std::int64_t strided_area(const Run& run, Interval own, Interval other, std::int64_t lo, std::int64_t hi) {
  const Interval inside = run.rows_inside(own);
  if (inside.count() <= 0 || other.count() <= 0 || lo > hi) return 0;
  const Run rows{run.at(inside.begin), inside.count(), run.step};
  hi = std::min(hi, other.end - 1 - rows.begin);
  lo = std::max(lo, other.begin - rows.last());
  return lo > hi ? 0 : strided_below(rows, other, hi) - strided_below(rows, other, lo - 1);
}

Interval overlap(Interval a, Interval b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace

std::int64_t area(const RegionList& mask, const Positions& queries, Interval keys) {
  std::int64_t sum = 0;
  for (const Run& run : queries.runs()) {
    const Interval met = mask.meeting({run.begin, run.last() + 1});
    for (std::int64_t r = met.begin; r < met.end; ++r) {
      const Region& region = mask[static_cast<std::size_t>(r)];
      sum += strided_area(run, region.q, overlap(region.k, keys), region.lo, region.hi);
    }
  }
  return sum;
}

std::int64_t area(const RegionList& mask, Interval queries, const Positions& keys) {
  std::int64_t sum = 0;
  const std::vector<Run>& runs = keys.runs();
  const auto meets_next = [](const Run& run, const Run& next) { return run.last() >= next.begin; };
  const bool ascending = std::adjacent_find(runs.begin(), runs.end(), meets_next) == runs.end();
  for (const Region& region : mask) {
    const auto ends_before = [](const Run& run, std::int64_t key) { return run.last() < key; };
    auto run = ascending ? std::lower_bound(runs.begin(), runs.end(), region.k.begin, ends_before) : runs.begin();
    for (; run != runs.end() && !(ascending && run->begin >= region.k.end); ++run)
      sum += strided_area(*run, region.k, overlap(region.q, queries), -region.hi, -region.lo);
  }
  return sum;
}

namespace {

bool leaves_gaps(const Region& region, std::int64_t step) {
  return bounded(region.lo) && bounded(region.hi) && region.hi - region.lo + 1 < step;
}

// The keys that rows first, first + step, .., last see of a region that cuts none of these rows off.
void append_seen(const Region& region, std::int64_t first, std::int64_t last, std::int64_t step, std::vector<Interval>& seen) {
  const std::int64_t begin = bounded(region.lo) ? std::max(region.k.begin, first + region.lo) : region.k.begin;
  const std::int64_t end = bounded(region.hi) ? std::min(region.k.end, last + region.hi + 1) : region.k.end;
  if (begin >= end) return;
  if (!leaves_gaps(region, step)) return seen.push_back({begin, end});
  for (std::int64_t row = first; row <= last; row += step) append_seen(region, row, row, 1, seen);
}

void append_seen(const RegionList& mask, const Positions& queries, std::vector<Interval>& seen) {
  const bool joins_gaps = queries.count() > kMostSeenRanges;
  for (const Run& run : queries.runs()) {
    const Interval met = mask.meeting({run.begin, run.last() + 1});
    for (std::int64_t r = met.begin; r < met.end; ++r) {
      const Region& region = mask[static_cast<std::size_t>(r)];
      if (region.q.begin > run.last() || region.q.end <= run.begin) continue;
      const auto part = restrict_to(region, {run.begin, run.last() + 1}, region.k);
      if (!part) continue;
      const Interval rows = run.rows_inside(part->q);
      if (rows.count() > 0) append_seen(*part, run.at(rows.begin), run.at(rows.end - 1), joins_gaps ? 1 : run.step, seen);
    }
  }
}

}  // namespace

std::vector<Interval> seen_keys(const RegionList& mask, const Positions& queries) {
  std::vector<Interval> seen;
  append_seen(mask, queries, seen);
  return join(std::move(seen));
}

std::vector<Interval> seen_keys(const CompiledMask& mask, const Positions& queries) {
  std::vector<Interval> seen;
  for (const BatchRegions& part : mask) append_seen(part.regions, queries, seen);
  return join(std::move(seen));
}

}  // namespace dattn
