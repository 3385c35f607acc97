#include "core/attention/positions.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {

Interval Run::rows_inside(Interval positions) const {
  const std::int64_t first = std::clamp<std::int64_t>(div_up(positions.begin - begin, step), 0, count);
  return {first, std::clamp<std::int64_t>(div_up(positions.end - begin, step), first, count)};
}

std::vector<Interval> join(std::vector<Interval> ranges) {
  const auto before = [](const Interval& a, const Interval& b) { return a.begin < b.begin; };
  if (!std::is_sorted(ranges.begin(), ranges.end(), before)) std::sort(ranges.begin(), ranges.end(), before);
  std::vector<Interval> joined;
  for (const Interval& range : ranges) {
    if (range.count() <= 0) continue;
    if (!joined.empty() && range.begin <= joined.back().end)
      joined.back().end = std::max(joined.back().end, range.end);
    else
      joined.push_back(range);
  }
  return joined;
}

Positions::Positions(const std::vector<Run>& runs) {
  runs_.reserve(runs.size());
  rows_.reserve(runs.size());
  for (const Run& run : runs) {
    if (run.count == 0) continue;
    ensure(run.count > 0 && run.step > 0, "a run of positions has count {} and step {}", run.count, run.step);
    rows_.push_back(count_);
    runs_.push_back({run.begin, run.count, run.count == 1 ? 1 : run.step});
    count_ += run.count;
  }
}

Positions Positions::range(std::int64_t begin, std::int64_t end) { return Positions({{begin, end - begin, 1}}); }

std::int64_t Positions::at(std::int64_t row) const {
  ensure(row >= 0 && row < count_, "row {} of {} rows", row, count_);
  const auto after = std::upper_bound(rows_.begin(), rows_.end(), row);
  const auto run = static_cast<std::size_t>(after - rows_.begin() - 1);
  return runs_[run].at(row - rows_[run]);
}

Positions Positions::rows(std::int64_t begin, std::int64_t count, std::int64_t step) const {
  std::vector<Run> part;
  const auto after = std::upper_bound(rows_.begin(), rows_.end(), begin);
  for (auto i = static_cast<std::size_t>(std::max<std::ptrdiff_t>(after - rows_.begin() - 1, 0)); i < runs_.size(); ++i) {
    if (count <= 0) break;
    const std::int64_t end = rows_[i] + runs_[i].count;
    if (begin >= end) continue;
    const std::int64_t inside = std::min(count, (end - begin + step - 1) / step);
    part.push_back({runs_[i].at(begin - rows_[i]), inside, runs_[i].step * step});
    begin += inside * step;
    count -= inside;
  }
  return Positions(part);
}

Positions Positions::inside(std::span<const Interval> ranges) const {
  std::vector<Run> parts;
  for (const Run& run : runs_) {
    const auto first = std::upper_bound(ranges.begin(), ranges.end(), run.begin,
                                        [](std::int64_t position, const Interval& range) { return position < range.end; });
    std::int64_t end = -1;  // of the rows so far; those that go on from there lengthen the part
    for (auto range = first; range != ranges.end() && range->begin <= run.last(); ++range) {
      const Interval rows = run.rows_inside(*range);
      if (rows.count() == 0) continue;
      if (rows.begin == end)
        parts.back().count += rows.count();
      else
        parts.push_back({run.at(rows.begin), rows.count(), run.step});
      end = rows.end;
    }
  }
  return Positions(parts);
}

std::vector<std::int64_t> Positions::list() const {
  std::vector<std::int64_t> all;
  all.reserve(static_cast<std::size_t>(count_));
  for (const Run& run : runs_) {
    for (std::int64_t row = 0; row < run.count; ++row) all.push_back(run.at(row));
  }
  return all;
}

std::string Positions::text() const {
  std::string all;
  for (const Run& run : runs_) {
    if (!all.empty()) all += ' ';
    all += run.step == 1 ? fmt::format("[{},{})", run.begin, run.begin + run.count)
                         : fmt::format("{}:{}:{}", run.begin, run.last() + 1, run.step);
  }
  return all.empty() ? "none" : all;
}

Interval split_evenly(std::int64_t total, std::int64_t parts, std::int64_t index) {
  const std::int64_t base = total / parts, larger = total % parts;
  const std::int64_t begin = index * base + std::min(index, larger);
  return {begin, begin + base + (index < larger ? 1 : 0)};
}

}  // namespace dattn
