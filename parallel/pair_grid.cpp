#include "parallel/pair_grid.h"

#include <algorithm>

namespace dattn {
namespace {

constexpr int kCells = 128;             // of a side of the picture,
constexpr int kLeastCells = 16;         // fewer where many regions are large:
constexpr double kMostCells = 1 << 17;  // of all regions together

// The part of split_evenly(length, cells, ..) that holds a position.
int cell_of(std::int64_t position, std::int64_t length, int cells) {
  const std::int64_t rows = length / cells, larger = length % cells, of_larger = larger * (rows + 1);
  return static_cast<int>(position < of_larger ? position / (rows + 1) : larger + (position - of_larger) / rows);
}

}  // namespace

PairGrid::PairGrid(const Problem& problem) : length_{problem.shape.seq_q, problem.shape.seq_kv} {
  double rectangles = 0;  // of all regions, in planes
  const double plane = std::max(1.0, static_cast<double>(length_[0]) * static_cast<double>(length_[1]));
  for (const BatchRegions& part : problem.mask) {
    for (const Region& region : part.regions)
      rectangles += static_cast<double>(region.q.count()) * static_cast<double>(region.k.count()) / plane;
  }
  int most = kCells;
  while (most > kLeastCells && rectangles * most * most > kMostCells) most /= 2;
  for (const int side : {0, 1}) cells_[side] = static_cast<int>(std::clamp<std::int64_t>(length_[side], 1, most));
  pairs_.assign(static_cast<std::size_t>(cells_[0]) * static_cast<std::size_t>(cells_[1]), 0);
  for (const BatchRegions& part : problem.mask) {
    for (const Region& region : part.regions) {
      if (region.q.count() == 0 || region.k.count() == 0) continue;
      const int last_row = cell_of(region.q.end - 1, length_[0], cells_[0]);
      for (int i = cell_of(region.q.begin, length_[0], cells_[0]); i <= last_row; ++i) {
        const auto row = restrict_to(region, split_evenly(length_[0], cells_[0], i), region.k);
        if (!row) continue;
        const int last = cell_of(row->k.end - 1, length_[1], cells_[1]);
        for (int j = cell_of(row->k.begin, length_[1], cells_[1]); j <= last; ++j) {
          const auto cell = restrict_to(*row, row->q, split_evenly(length_[1], cells_[1], j));
          if (!cell) continue;
          pairs_[static_cast<std::size_t>(i) * static_cast<std::size_t>(cells_[1]) + static_cast<std::size_t>(j)] +=
              static_cast<double>(area(*cell)) * static_cast<double>(part.batch.count());
        }
      }
    }
  }
}

PairGrid::Share PairGrid::share(const Positions& rows, bool key_side) const {
  const std::int64_t length = length_[key_side ? 1 : 0];
  const int cells = cells_[key_side ? 1 : 0];
  std::vector<double> held(static_cast<std::size_t>(cells), 0);
  for (const Run& run : rows.runs()) {
    const int last = cell_of(run.last(), length, cells);
    for (int cell = cell_of(run.begin, length, cells); cell <= last; ++cell) {
      const Interval own = split_evenly(length, cells, cell);
      held[static_cast<std::size_t>(cell)] +=
          static_cast<double>(run.rows_inside(own).count()) / static_cast<double>(own.count());
    }
  }
  Share share;
  for (int cell = 0; cell < cells; ++cell) {
    if (held[static_cast<std::size_t>(cell)] > 0) share.emplace_back(cell, held[static_cast<std::size_t>(cell)]);
  }
  return share;
}

std::vector<double> PairGrid::seen(const Share& queries) const {
  std::vector<double> sums(static_cast<std::size_t>(cells_[1]), 0);
  for (const auto& [cell, held] : queries) {
    const double* row = &pairs_[static_cast<std::size_t>(cell) * sums.size()];
    for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += held * row[j];
  }
  return sums;
}

double PairGrid::pairs(const std::vector<double>& seen, const Share& keys) {
  double sum = 0;
  for (const auto& [cell, held] : keys) sum += held * seen[static_cast<std::size_t>(cell)];
  return sum;
}

}  // namespace dattn
