// Positions and even splits.
#include "core/attention/positions.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

Positions some_positions() {
  std::vector<Run> runs;
  std::int64_t next = pick(0, 5);
  for (std::int64_t i = pick(0, 5); i > 0; --i) {
    const Run run{next, pick(0, 7), pick(1, 5)};
    runs.push_back(run);
    next = (run.count > 0 ? run.last() + 1 : next) + pick(0, 4);
  }
  if (*rc::gen::arbitrary<bool>()) std::reverse(runs.begin(), runs.end());  // row order need not be ascending
  return Positions(runs);
}

TEST(Positions, Text) {
  EXPECT_EQ(Positions({{0, 8, 1}, {24, 8, 1}}).text(), "[0,8) [24,32)");
  EXPECT_EQ(Positions({{3, 128, 8}}).text(), "3:1020:8");
  EXPECT_EQ(Positions().text(), "none");
}

TEST(Positions, EmptyRunsAreDroppedAndBadOnesRefused) {
  EXPECT_EQ(Positions({{5, 0, 1}, {7, 2, 1}, {1, 0, 3}}), Positions::range(7, 9));
  EXPECT_EQ(Positions::range(4, 4).count(), 0);
  EXPECT_THROW(Positions({{0, -1, 1}}), Error);
  EXPECT_THROW(Positions({{0, 2, 0}}), Error);
  EXPECT_THROW(Positions::range(0, 3).at(3), Error);
  EXPECT_THROW(Positions::range(0, 3).at(-1), Error);
}

TEST(Positions, ARunOfOneRowHasStepOne) { EXPECT_EQ(Positions({{5, 1, 9}}).runs().front().step, 1); }

RC_GTEST_PROP(Positions, ListAtAndRowsAgree, ()) {
  const Positions positions = some_positions();
  const auto all = positions.list();
  RC_ASSERT(static_cast<std::int64_t>(all.size()) == positions.count());
  for (std::size_t row = 0; row < all.size(); ++row) RC_ASSERT(positions.at(static_cast<std::int64_t>(row)) == all[row]);
  for (std::size_t run = 0; run < positions.runs().size(); ++run) {
    RC_ASSERT(positions.at(positions.row_of_run(run)) == positions.runs()[run].begin);
  }
  const auto begin = pick(0, positions.count() + 1);
  const auto count = pick(0, positions.count() - begin + 1);
  RC_ASSERT(positions.rows(begin, count).list() == std::vector<std::int64_t>(all.begin() + begin, all.begin() + begin + count));
}

RC_GTEST_PROP(Positions, EveryFewRows, ()) {
  const Positions positions = some_positions();
  const std::int64_t step = pick(1, 5), begin = pick(0, positions.count() + 1);
  const std::int64_t count = pick(0, (positions.count() - begin + step - 1) / step + 1);
  const std::vector<std::int64_t> all = positions.list(), part = positions.rows(begin, count, step).list();
  RC_ASSERT(std::ssize(part) == count);
  for (std::int64_t i = 0; i < count; ++i)
    RC_ASSERT(part[static_cast<std::size_t>(i)] == all[static_cast<std::size_t>(begin + i * step)]);
}

RC_GTEST_PROP(Positions, InsideRangesAreTheirsInRowOrderAndTheFewestRuns, ()) {
  const Positions positions = some_positions();
  std::vector<Interval> ranges;
  for (std::int64_t end = pick(0, 10); end < 60; end = ranges.back().end + pick(1, 9))
    ranges.push_back({end, end + pick(1, 9)});
  std::vector<std::int64_t> expected;
  std::size_t runs = 0;
  for (const Run& run : positions.runs()) {
    bool before = false;
    for (std::int64_t row = 0; row < run.count; ++row) {
      const bool inside = std::any_of(ranges.begin(), ranges.end(), [at = run.at(row)](const Interval& range) {
        return at >= range.begin && at < range.end;
      });
      if (inside) expected.push_back(run.at(row));
      runs += inside && !before ? 1 : 0;
      before = inside;
    }
  }
  RC_ASSERT(positions.inside(ranges).list() == expected);
  RC_ASSERT(positions.inside(ranges).runs().size() == runs);
}

RC_GTEST_PROP(SplitEvenly, PartsAreInOrderAndDifferByAtMostOne, ()) {
  const auto total = pick(0, 1000);
  const auto parts = pick(1, 40);
  std::int64_t next = 0, previous = total;
  for (std::int64_t i = 0; i < parts; ++i) {
    const Interval part = split_evenly(total, parts, i);
    RC_ASSERT(part.begin == next);
    RC_ASSERT(part.count() == total / parts || part.count() == total / parts + 1);
    RC_ASSERT(part.count() <= previous);  // larger ones first
    next = part.end;
    previous = part.count();
  }
  RC_ASSERT(next == total);
}

}  // namespace
}  // namespace dattn
