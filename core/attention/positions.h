// Which global token positions a block of rows holds, in row order. A layout gives every rank such a list; masks
// are stated over positions, so masks and layouts never need to know each other.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace dattn {

// Half-open.
struct Interval {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t count() const { return end - begin; }
  bool operator==(const Interval&) const = default;
};

// Positions begin, begin + step, .., begin + (count - 1) * step. count >= 1, step >= 1.
struct Run {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::int64_t step = 1;

  std::int64_t at(std::int64_t row) const { return begin + row * step; }
  std::int64_t last() const { return at(count - 1); }
  Interval rows_inside(Interval positions) const;  // the rows at these positions
  bool operator==(const Run&) const = default;
};

// Quotients rounded down and up; b > 0.
constexpr std::int64_t div_down(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
constexpr std::int64_t div_up(std::int64_t a, std::int64_t b) { return a / b + (a % b > 0 ? 1 : 0); }

// The ascending disjoint ranges that hold the same positions; neighbours are joined.
std::vector<Interval> join(std::vector<Interval> ranges);

// Runs in row order, with the row each starts at. Positions of one list are distinct.
class Positions {
 public:
  Positions() = default;
  explicit Positions(const std::vector<Run>& runs);  // empty runs are dropped
  static Positions range(std::int64_t begin, std::int64_t end);

  std::int64_t count() const { return count_; }
  const std::vector<Run>& runs() const { return runs_; }
  std::int64_t row_of_run(std::size_t run) const { return rows_[run]; }
  std::int64_t at(std::int64_t row) const;
  Positions rows(std::int64_t begin, std::int64_t count, std::int64_t step = 1) const;  // of every step-th row from begin on
  Positions inside(std::span<const Interval> ranges) const;  // those in ascending disjoint ranges, in row order
  std::vector<std::int64_t> list() const;
  std::string text() const;  // "[0,8) [24,32)" or "3:1024:8" for strided runs
  bool operator==(const Positions& other) const { return runs_ == other.runs_; }

 private:
  std::vector<Run> runs_;
  std::vector<std::int64_t> rows_;
  std::int64_t count_ = 0;
};

// Part `index` of `total` cut into `parts` pieces whose sizes differ by at most one, the larger ones first.
Interval split_evenly(std::int64_t total, std::int64_t parts, std::int64_t index);

}  // namespace dattn
