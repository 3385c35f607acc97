// Every mask kind, compiled to regions, against its meaning pair by pair; and the messages of refused ones.
#include "core/attention/mask.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/attention/some_mask.h"

namespace dattn {
namespace {

void assert_means(const MaskCase& c, std::int64_t seq_q, std::int64_t seq_kv) {
  assert_shows(compile(c.mask, seq_q, seq_kv), c.sees, seq_q, seq_kv);
}

std::int64_t some_length() { return pick(0, kLongest + 1); }

RC_GTEST_PROP(Mask, BandsMeanWhatTheySay, ()) { assert_means(some_band(), some_length(), some_length()); }

RC_GTEST_PROP(Mask, DocumentsMeanWhatTheySay, ()) {
  const auto seq_q = some_length(), seq_kv = some_length();
  assert_means(some_documents(seq_q, seq_kv), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, PrefixMeansWhatItSays, ()) {
  const auto seq_q = some_length(), seq_kv = some_length();
  assert_means(some_prefix(seq_kv), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, GlobalMeansWhatItSays, ()) {
  const auto seq_q = some_length(), seq_kv = some_length();
  assert_means(some_global(seq_q, seq_kv), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, BlocksMeanWhatTheySay, ()) {
  const auto seq_q = some_length(), seq_kv = some_length();
  assert_means(some_blocks(seq_q, seq_kv), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, OverlappingRegionsShowTheirUnionOnce, ()) {
  const auto seq_q = some_length(), seq_kv = some_length();
  assert_means(some_union_of_regions(seq_q, seq_kv), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, UserRegionsAreTakenOrRefusedForOverlap, ()) {
  const std::vector<Region> regions = some_regions(kLongest, kLongest);
  const auto hits = [&](std::int64_t q, std::int64_t k) {
    return std::count_if(regions.begin(), regions.end(), [&](const Region& r) { return r.contains(q, k); });
  };
  bool overlap = false;
  for (std::int64_t q = 0; q < kLongest; ++q) {
    for (std::int64_t k = 0; k < kLongest; ++k) overlap |= hits(q, k) > 1;
  }
  if (overlap) {
    RC_ASSERT_THROWS_AS(compile(Mask::of_regions(regions), kLongest, kLongest), Error);
  } else {
    assert_means({Mask::of_regions(regions), [&](auto q, auto k, auto, auto) { return hits(q, k) == 1; }}, kLongest, kLongest);
  }
}

void expect_refused(const Mask& mask, std::int64_t seq, const std::string& why) {
  try {
    compile(mask, seq, seq);
    FAIL() << mask.text() << " was taken; expected: " << why;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    EXPECT_THAT(error.what(), testing::HasSubstr(why));
  }
}

TEST(Mask, BadOnesAreRefusedWithTheReason) {
  expect_refused(Mask::window(-2, 0), 8, "mask window has left -2 and right 0");
  expect_refused(Mask::documents({0, 5, 3}, Mask::causal()), 8, "cu_seqlens[2] = 3 is less than cu_seqlens[1] = 5; sort them");
  expect_refused(Mask::documents({1, 5}, Mask::causal()), 8, "got 2 entries starting at 1");
  expect_refused(Mask::documents({0}, Mask::causal()), 8, "at least 2 entries");
  expect_refused(Mask::documents({}, Mask::causal()), 8, "got 0 entries");
  expect_refused(Mask::documents({0, 9}, Mask::causal()), 8,
                 "cu_seqlens ends at 9 but the sequence has 8 positions; end it at 8");
  expect_refused(Mask::documents({0, 8}, Mask::of_regions({})), 8, "mask kind 'regions' is no band");
  expect_refused(Mask::documents({0, 4, 8}, Mask::full(), {0, 8}), 8, "cu_seqlens has 3 entries and cu_seqlens_kv 2");
  expect_refused(Mask::documents({0, 4, 8}, Mask::full(), {0, 5, 4}), 8,
                 "cu_seqlens_kv[2] = 4 is less than cu_seqlens_kv[1] = 5");
  expect_refused(Mask::documents({0, 4}, Mask::full(), {0, 9}), 8, "cu_seqlens_kv ends at 9 but there are 8 keys");
  expect_refused(Mask::prefix(9), 8, "mask prefix has length 9 but there are 8 keys");
  expect_refused(Mask::prefix(-1), 8, "mask prefix has length -1");
  expect_refused(Mask::global(-1, 2, 0), 8, "mask global has tokens -1 but the sequence has 8 positions; use 0 to 8");
  expect_refused(Mask::global(9, 2, 0), 8, "mask global has tokens 9 but the sequence has 8 positions; use 0 to 8");
  expect_refused(Mask::global(1, 2, -2), 8, "mask global has left 2 and right -2");
  expect_refused(Mask::blocks(0, {}), 8, "mask blocks has size 0; use 1 to");
  expect_refused(Mask::blocks(3, {{0, 0}, {2, 3}}), 8,
                 "entry 1 is [2, 3], but 8 queries and 8 keys have 3 and 3 blocks of size 3; use [0, 0] to [2, 2]");
  expect_refused(Mask::blocks(3, {{-1, 0}}), 8, "entry 0 is [-1, 0]");
  expect_refused(Mask::blocks(3, {{1, 0}, {0, 0}, {1, 1}, {1, 0}}), 8, "mask blocks lists [1, 0] twice");
  expect_refused(Mask::padding({8, 8}), 8, "mask kind 'padding' differs between batch rows");
  expect_refused(Mask::per_row({Mask::full()}), 8, "mask kind 'per_row' differs between batch rows");
  expect_refused(Mask::of_regions({{{0, 9}, {0, 8}}}), 8,
                 "mask region 0 has q [0, 9] but the queries are [0, 8]; write 0 <= begin <= end <= 8");
  expect_refused(Mask::of_regions({{{0, 8}, {0, 8}, 1, 2}, {{0, 8}, {3, 2}}}), 8, "mask region 1 has k [3, 2]");
  expect_refused(Mask::of_regions({{{-1, 8}, {0, 8}}}), 8, "mask region 0 has q [-1, 8]");
  expect_refused(Mask::of_regions({{{0, 8}, {0, 8}, -2, 2}, {{5, 6}, {0, 8}}}), 8,
                 "overlap, first at query 5; make them disjoint, or set overlap: first");
  expect_refused(Mask::of_regions({{{4, 8}, {0, 8}}, {{0, 5}, {0, 8}}}), 8, "overlap, first at query 4; make them disjoint");
  expect_refused(Mask::full(), kMaxPosition + 1, "must lie in [0,");
  expect_refused(Mask::full(), -1, "must lie in [0,");
}

// What lies outside is measured by the side that it names, or by the longer one where it names both.
TEST(Mask, PositionsOutsideOneSide) {
  EXPECT_EQ(area(compile(Mask::global(8, 0, 0), 3, 8)), 24);
  EXPECT_EQ(area(compile(Mask::global(8, 0, 0), 8, 3)), 24);
  EXPECT_THROW(compile(Mask::global(9, 0, 0), 3, 8), Error);
  EXPECT_EQ(area(compile(Mask::global(3, 0, 0, true), 8, 3)), 1 + 2 + 6 * 3);
  EXPECT_THROW(compile(Mask::global(4, 0, 0, true), 8, 3), Error);
  EXPECT_EQ(area(compile(Mask::window(100, 100), 3, 8)), 24);  // a reach is no position: models have windows longer than a text
  EXPECT_EQ(area(compile(Mask::documents({0, 2, 5}, Mask::full()), 8, 8)), 4 + 9);  // positions 5, 6, 7 see nothing
  EXPECT_THROW(compile_batch(Mask::padding({8, 9}), 2, 8, 8), Error);
  EXPECT_THROW(compile_batch(Mask::per_row({Mask::full(), Mask::prefix(9)}), 2, 8, 8), Error);
}

TEST(Mask, AlignOfKindsThatHaveNoneIsRefused) {
  Mask mask = Mask::prefix(3);
  mask.align = Mask::Align::kEnd;
  expect_refused(mask, 8, "mask kind 'prefix' has no align");
}

TEST(Mask, CausalBottomRightIsCausalWithTheEndsAligned) {
  EXPECT_EQ(compile(Mask::causal_bottom_right(), 3, 8), compile(Mask::causal(Mask::Align::kEnd), 3, 8));
  EXPECT_EQ(compile(Mask::causal_bottom_right(), 3, 8), (std::vector<Region>{{{0, 3}, {0, 8}, -kUnbounded, 5}}));
  EXPECT_EQ(area(compile(Mask::causal_bottom_right(), 8, 3)), 6);  // the first 5 queries see nothing
}

TEST(Mask, NeighbouringBlocksOfARowAreOneRegion) {
  const auto regions = compile(Mask::blocks(4, {{0, 2}, {0, 1}, {1, 1}, {1, 3}, {0, 3}}), 8, 14);
  EXPECT_EQ(regions, (std::vector<Region>{{{0, 4}, {4, 14}}, {{4, 8}, {4, 8}}, {{4, 8}, {12, 14}}}));
}

TEST(Mask, OfOverlappingRegionsTheFirstWins) {
  const Region first{{2, 6}, {2, 6}, -1, 1}, second{{0, 8}, {0, 8}};
  const auto regions = compile(Mask::of_regions({first, second}, Mask::Overlap::kFirst), 8, 8);
  EXPECT_NE(std::find(regions.begin(), regions.end(), first), regions.end());
  EXPECT_EQ(area(regions), 64);
}

TEST(Mask, ManyDocumentsCompileInOnePass) {
  std::vector<std::int64_t> bounds;
  for (std::int64_t i = 0; i <= 100'000; ++i) bounds.push_back(i * 10);
  const auto regions = compile(Mask::documents(bounds, Mask::causal()), 1'000'000, 1'000'000);
  EXPECT_EQ(regions.size(), 100'000u);
  EXPECT_EQ(area(regions), 100'000 * 55);
}

TEST(Mask, LongestSequencesDoNotOverflow) {
  const std::int64_t n = kMaxPosition, size = std::int64_t{1} << 39;
  using Regions = std::vector<Region>;
  EXPECT_EQ(compile(Mask::causal_bottom_right(), 1, n), (Regions{{{0, 1}, {0, n}}}));
  EXPECT_EQ(compile(Mask::window(0, 0, Mask::Align::kEnd), n, 1), (Regions{{{n - 1, n}, {0, 1}}}));
  EXPECT_EQ(compile(Mask::window(INT64_MAX, INT64_MAX, Mask::Align::kEnd), 1, n), (Regions{{{0, 1}, {0, n}}}));
  EXPECT_EQ(compile(Mask::prefix(n), n, n), (Regions{{{0, n}, {0, n}}}));
  EXPECT_EQ(compile(Mask::global(n, 0, 0), n, n), (Regions{{{0, n}, {0, n}}}));
  EXPECT_EQ(compile(Mask::global(1, INT64_MAX, 0, true), n, n), (Regions{{{0, n}, {0, 1}}, {{1, n}, {1, n}, -kUnbounded, 0}}));
  EXPECT_EQ(compile(Mask::blocks(size, {{1, 0}, {1, 1}}), n, n), (Regions{{{size, n}, {0, n}}}));
  EXPECT_EQ(compile(Mask::documents({0, n}, Mask::causal_bottom_right(), {0, 1}), n, 1), (Regions{{{n - 1, n}, {0, 1}}}));
}

TEST(Mask, LongSequencesCompileWithoutLookingAtPairs) {
  const auto regions = compile(Mask::window(4095, 0), 1'000'000'000, 1'000'000'000);
  EXPECT_EQ(area(regions), 4096 * std::int64_t{1'000'000'000} - 4095 * 4096 / 2);
}

TEST(Mask, Text) {
  EXPECT_EQ(Mask::window(128, 0).text(), "window(left 128, right 0)");
  EXPECT_EQ(Mask::documents({0, 3, 8}, Mask::causal()).text(), "documents(2, causal)");
  EXPECT_EQ(Mask::full().text(), "full");
  EXPECT_EQ(Mask::causal(Mask::Align::kEnd).text(), "causal(align end)");
  EXPECT_EQ(Mask::causal_bottom_right().text(), "causal_bottom_right");
  EXPECT_EQ(Mask::window(2, -1, Mask::Align::kEnd).text(), "window(left 2, right -1, align end)");
  EXPECT_EQ(Mask::prefix(12).text(), "prefix(12)");
  EXPECT_EQ(Mask::global(4, 128, 0, true).text(), "global(4, left 128, right 0, causal)");
  EXPECT_EQ(Mask::blocks(64, {{0, 0}, {1, 0}}).text(), "blocks(2 of size 64)");
  EXPECT_EQ(Mask::padding({3, 5}, Mask::causal()).text(), "padding(2 rows, causal)");
  EXPECT_EQ(Mask::of_regions({}, Mask::Overlap::kFirst).text(), "regions(0, overlap first)");
  EXPECT_EQ(Mask::per_row({Mask::full()}).text(), "per_row(1 rows)");
}

}  // namespace
}  // namespace dattn
