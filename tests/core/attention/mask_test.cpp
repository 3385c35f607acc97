// Every mask kind, compiled to regions, against its meaning pair by pair; and the messages of refused ones.
#include "core/attention/mask.h"

#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/random.h"

namespace dattn {
namespace {

constexpr std::int64_t kLongest = 17;
using Sees = std::function<bool(std::int64_t q, std::int64_t k)>;

struct Case {
  Mask mask;
  Sees sees;
};

Case some_band() {
  switch (pick(0, 3)) {
    case 0: return {Mask::full(), [](auto, auto) { return true; }};
    case 1: return {Mask::causal(), [](auto q, auto k) { return k <= q; }};
    default: {
      const auto left = pick(-1, kLongest + 3);
      const auto right = pick(-1, kLongest + 3);
      return {Mask::window(left, right),
              [=](auto q, auto k) { return (left < 0 || k >= q - left) && (right < 0 || k <= q + right); }};
    }
  }
}

Case some_documents(std::int64_t longest) {
  std::vector<std::int64_t> bounds{0};
  for (std::int64_t i = pick(1, 6); i > 0; --i) bounds.push_back(pick(bounds.back(), longest + 1));
  const Case within = some_band();
  const auto document = [bounds](std::int64_t position) {
    return std::upper_bound(bounds.begin(), bounds.end(), position) - bounds.begin();
  };
  const auto end = bounds.back();
  return {Mask::documents(bounds, within.mask),
          [=](auto q, auto k) { return q < end && k < end && document(q) == document(k) && within.sees(q, k); }};
}

void assert_means(const Case& c, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::vector<Region> regions = compile(c.mask, seq_q, seq_kv);
  std::int64_t visible = 0;
  for (std::int64_t q = 0; q < seq_q; ++q) {
    for (std::int64_t k = 0; k < seq_kv; ++k) {
      const auto hits = std::count_if(regions.begin(), regions.end(), [&](const Region& r) { return r.contains(q, k); });
      RC_ASSERT(hits == (c.sees(q, k) ? 1 : 0));
      visible += hits;
    }
  }
  RC_ASSERT(area(regions) == visible);
  for (const Region& region : regions) {
    RC_ASSERT(region.q.begin >= 0 && region.q.end <= seq_q && region.k.begin >= 0 && region.k.end <= seq_kv);
    RC_ASSERT(restrict_to(region, region.q, region.k) == region);  // trimmed
  }
}

RC_GTEST_PROP(Mask, BandsMeanWhatTheySay, ()) {
  const auto seq_q = pick(0, kLongest), seq_kv = pick(0, kLongest);
  assert_means(some_band(), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, DocumentsMeanWhatTheySay, ()) {
  const auto seq_q = pick(0, kLongest), seq_kv = pick(0, kLongest);
  assert_means(some_documents(std::max(seq_q, seq_kv)), seq_q, seq_kv);
}

RC_GTEST_PROP(Mask, UserRegionsAreTakenOrRefusedForOverlap, ()) {
  std::vector<Region> regions;
  for (std::int64_t i = pick(0, 4); i > 0; --i) {
    const std::int64_t lo = pick(-12, 9);
    regions.push_back({pick_interval(kLongest), pick_interval(kLongest), lo, lo + pick(-1, 4)});
  }
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
    assert_means({Mask::of_regions(regions), [&](auto q, auto k) { return hits(q, k) == 1; }}, kLongest, kLongest);
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
  expect_refused(Mask::documents({0, 9}, Mask::causal()), 8, "cu_seqlens ends at 9 but the sequence has 8 positions");
  expect_refused(Mask::documents({0, 8}, Mask::of_regions({})), 8, "mask kind 'regions' is no band");
  expect_refused(Mask::of_regions({{{0, 9}, {0, 8}}}), 8, "mask region 0 has q [0, 9] but the queries are [0, 8]");
  expect_refused(Mask::of_regions({{{0, 8}, {0, 8}, 1, 2}, {{0, 8}, {3, 2}}}), 8, "mask region 1 has k [3, 2]");
  expect_refused(Mask::of_regions({{{-1, 8}, {0, 8}}}), 8, "mask region 0 has q [-1, 8]");
  expect_refused(Mask::of_regions({{{0, 8}, {0, 8}, -2, 2}, {{5, 6}, {0, 8}}}), 8,
                 "overlap, first at query 5; make them disjoint");
  expect_refused(Mask::of_regions({{{4, 8}, {0, 8}}, {{0, 5}, {0, 8}}}), 8, "overlap, first at query 4; make them disjoint");
  expect_refused(Mask::full(), kMaxPosition + 1, "must lie in [0,");
  expect_refused(Mask::full(), -1, "must lie in [0,");
}

TEST(Mask, LongSequencesCompileWithoutLookingAtPairs) {
  const auto regions = compile(Mask::window(4095, 0), 1'000'000'000, 1'000'000'000);
  EXPECT_EQ(area(regions), 4096 * std::int64_t{1'000'000'000} - 4095 * 4096 / 2);
}

TEST(Mask, Text) {
  EXPECT_EQ(Mask::window(128, 0).text(), "window(left 128, right 0)");
  EXPECT_EQ(Mask::documents({0, 3, 8}, Mask::causal()).text(), "documents(2, causal)");
  EXPECT_EQ(Mask::full().text(), "full");
}

}  // namespace
}  // namespace dattn
