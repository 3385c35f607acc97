// Masks over a batch: the kinds that differ between rows against their meaning, runs of equal rows, and slices.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "core/base/error.h"
#include "tests/core/attention/some_mask.h"

namespace dattn {
namespace {

// The runs are ascending, cover [0, batch) and differ from their neighbours.
void assert_runs(const CompiledMask& compiled, std::int64_t batch) {
  std::int64_t next = 0;
  for (std::size_t i = 0; i < compiled.size(); ++i) {
    RC_ASSERT(compiled[i].batch.begin == next);
    RC_ASSERT(compiled[i].batch.count() > 0);
    if (i > 0) RC_ASSERT(compiled[i].regions != compiled[i - 1].regions);
    next = compiled[i].batch.end;
  }
  RC_ASSERT(next == batch);
}

const RegionList& regions_of(const CompiledMask& compiled, std::int64_t row) {
  const auto run = std::find_if(compiled.begin(), compiled.end(), [&](const BatchRegions& one) { return row < one.batch.end; });
  return run->regions;
}

struct BatchCase {
  Mask mask;
  std::vector<Sees> sees;  // of each row
};

BatchCase some_padding(std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv) {
  const MaskCase within = some_band();
  std::vector<std::int64_t> lengths;
  std::vector<Sees> sees;
  for (std::int64_t row = 0; row < batch; ++row) {
    const bool repeat = row > 0 && pick(0, 3) == 0;
    const std::int64_t length = repeat ? lengths.back() : pick(0, std::max(seq_q, seq_kv) + 1);
    lengths.push_back(length);
    sees.emplace_back([=](auto q, auto k, auto n_q, auto n_k) {
      return q < length && k < length && within.sees(q, k, std::min(length, n_q), std::min(length, n_k));
    });
  }
  return {Mask::padding(lengths, within.mask), sees};
}

BatchCase some_per_row(std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv) {
  std::vector<Mask> rows;
  std::vector<Sees> sees;
  MaskCase one = some_mask(seq_q, seq_kv);
  for (std::int64_t row = 0; row < batch; ++row) {
    if (pick(0, 3) > 0) one = some_mask(seq_q, seq_kv);  // else as the row before
    rows.push_back(one.mask);
    sees.push_back(one.sees);
  }
  return {Mask::per_row(rows), sees};
}

BatchCase some_case(std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv) {
  return pick(0, 2) == 0 ? some_padding(batch, seq_q, seq_kv) : some_per_row(batch, seq_q, seq_kv);
}

RC_GTEST_PROP(BatchMask, EveryRowMeansWhatItSays, ()) {
  const auto batch = pick(0, 6), seq_q = pick(0, kLongest + 1), seq_kv = pick(0, kLongest + 1);
  const BatchCase c = some_case(batch, seq_q, seq_kv);
  const CompiledMask compiled = compile_batch(c.mask, batch, seq_q, seq_kv);
  assert_runs(compiled, batch);
  for (std::int64_t row = 0; row < batch; ++row) {
    assert_shows(regions_of(compiled, row), c.sees[static_cast<std::size_t>(row)], seq_q, seq_kv);
  }
}

RC_GTEST_PROP(BatchMask, ASliceMeansItsRows, ()) {
  const auto batch = pick(1, 6), seq_q = pick(0, kLongest + 1), seq_kv = pick(0, kLongest + 1);
  const BatchCase c = some_case(batch, seq_q, seq_kv);
  const Interval rows = pick_interval(batch);
  const CompiledMask whole = compile_batch(c.mask, batch, seq_q, seq_kv);
  const CompiledMask slice = compile_batch(batch_slice(c.mask, rows), rows.count(), seq_q, seq_kv);
  assert_runs(slice, rows.count());
  for (std::int64_t row = 0; row < rows.count(); ++row) {
    RC_ASSERT(regions_of(slice, row) == regions_of(whole, rows.begin + row));
  }
}

RC_GTEST_PROP(BatchMask, OtherKindsAreOneRunAndStayThemselvesInSlices, ()) {
  const auto batch = pick(1, 6), seq_q = pick(0, kLongest + 1), seq_kv = pick(0, kLongest + 1);
  const Mask mask = some_mask(seq_q, seq_kv).mask;
  const auto regions = compile(mask, seq_q, seq_kv);
  const CompiledMask compiled = compile_batch(mask, batch, seq_q, seq_kv);
  RC_ASSERT(compiled.size() == 1u);
  RC_ASSERT(compiled[0].batch == (Interval{0, batch}));
  RC_ASSERT(compiled[0].regions == regions);
  RC_ASSERT(compile(batch_slice(mask, {1, 1}), seq_q, seq_kv) == regions);
}

TEST(BatchMask, RowsOfEqualLengthAreOneRun) {
  const CompiledMask compiled = compile_batch(Mask::padding({3, 3, 0, 8, 8, 8}, Mask::causal()), 6, 8, 8);
  ASSERT_EQ(compiled.size(), 3u);
  EXPECT_EQ(compiled[0].batch, (Interval{0, 2}));
  EXPECT_EQ(compiled[1].batch, (Interval{2, 3}));
  EXPECT_TRUE(compiled[1].regions.empty());
  EXPECT_EQ(compiled[2].batch, (Interval{3, 6}));
}

TEST(BatchMask, EndsOfPaddedRowsAreTheirOwn) {
  const CompiledMask compiled = compile_batch(Mask::padding({2, 6}, Mask::causal_bottom_right()), 2, 4, 8);
  ASSERT_EQ(compiled.size(), 2u);
  EXPECT_EQ(compiled[0].regions, (std::vector<Region>{{{0, 2}, {0, 2}, -kUnbounded, 0}}));
  EXPECT_EQ(compiled[1].regions, (std::vector<Region>{{{0, 4}, {0, 6}, -kUnbounded, 2}}));
}

template <class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    return error.what();
  }
  return "no error";
}

TEST(BatchMask, BadOnesAreRefusedWithTheReason) {
  const auto why = [](const Mask& mask, std::int64_t batch, std::int64_t seq = 8) {
    return refusal([&] { compile_batch(mask, batch, seq, seq); });
  };
  using testing::HasSubstr;
  EXPECT_THAT(why(Mask::padding({3, 4}), 3), HasSubstr("mask padding has 2 entries but the batch has 3 rows"));
  EXPECT_THAT(why(Mask::per_row({Mask::full()}), 2), HasSubstr("mask per_row has 1 entries but the batch has 2 rows"));
  EXPECT_THAT(why(Mask::padding({3, 9}), 2), HasSubstr("mask padding: lengths[1] = 9 but the sequence has 8 positions"));
  EXPECT_THAT(why(Mask::padding({-1}), 1), HasSubstr("lengths[0] = -1"));
  EXPECT_THAT(why(Mask::padding({3}, Mask::prefix(2)), 1), HasSubstr("mask kind 'prefix' is no band"));
  EXPECT_THAT(why(Mask::per_row({Mask::full(), Mask::padding({3})}), 2), HasSubstr("mask per_row: entry 1 has kind 'padding'"));
  EXPECT_THAT(why(Mask::per_row({Mask::per_row({})}), 1), HasSubstr("mask per_row: entry 0 has kind 'per_row'"));
  EXPECT_THAT(why(Mask::full(), -1), HasSubstr("a batch of -1 rows"));
  EXPECT_THAT(why(Mask::padding({3}), 1, kMaxPosition + 1), HasSubstr("must lie in [0,"));
  EXPECT_THAT(refusal([] {
                batch_slice(Mask::padding({3, 4}), {1, 3});
              }),
              HasSubstr("batch rows [1, 3) of a mask padding that has 2 entries"));
}

}  // namespace
}  // namespace dattn
