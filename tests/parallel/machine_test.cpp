// Machine files: the committed ones load, the page of keys is current, nonsense is refused; pairs in whole tiles.
#include "parallel/machine.h"

#include <cstdlib>
#include <filesystem>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"
#include "tests/parallel/small_machine.h"

namespace dattn {
namespace {

std::filesystem::path machines_folder() { return std::filesystem::path(DATTN_SOURCE_DIR) / "configs" / "machines"; }

TEST(Machine, CommittedFilesLoadUnderTheirOwnNames) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(machines_folder())) {
    if (entry.path().extension() != ".yaml") continue;
    ++files;
    const Machine machine = load_machine(entry.path().string());
    EXPECT_EQ(machine.name, entry.path().stem().string());
    EXPECT_GT(machine.flops.bf16, machine.flops.fp32);
    EXPECT_GT(machine.memory_bandwidth, machine.links.inside.bandwidth);
  }
  EXPECT_EQ(files, 5);
}

TEST(MachineSchema, CommittedPageIsCurrent) {
  const std::string path = (machines_folder() / "SCHEMA.md").string(), page = machine_schema();
  if (std::getenv("DATTN_UPDATE") != nullptr) write_file(path, page);
  EXPECT_EQ(read_file(path, "schema page"), page)
      << "run dattn_parallel_tests --gtest_filter=MachineSchema.* with DATTN_UPDATE=1";
}

TEST(Machine, NonsenseIsRefusedWithItsPlace) {
  const std::string whole =
      "memory_bytes: 1000\nflops: {fp32: 1e12, bf16: 2e12}\nmemory_bandwidth: 1e11\nlinks: {inside: {bandwidth: 1e10}}\n";
  EXPECT_EQ(parse_config_as<Machine>(whole, "m.yaml").links.inside.bandwidth, 1e10);
  const auto refusal = [](const std::string& text, const std::vector<std::string>& set) -> std::string {
    try {
      parse_config_as<Machine>(text, "m.yaml", set);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kBadInput);
      return error.what();
    }
    return "accepted";
  };
  EXPECT_NE(refusal("{}", {}).find("memory_bytes"), std::string::npos);
  EXPECT_NE(refusal(whole, {"flops.bf16=0"}).find("flops.bf16"), std::string::npos);
  EXPECT_NE(refusal(whole, {"attend_of_peak=1.5"}).find("must lie in (0, 1]"), std::string::npos);
  EXPECT_NE(refusal(whole, {"links.between={latency_s: -1, bandwidth: 1}"}).find("links.between.latency_s"), std::string::npos);
  EXPECT_NE(refusal(whole, {"links.between={latency_s: 1}"}).find("links.between.bandwidth"), std::string::npos);
  EXPECT_NE(refusal(whole, {"links.inside={}"}).find("links.inside.bandwidth"), std::string::npos);
  EXPECT_NE(refusal(whole, {"tile={rows: 0}"}).find("tile.rows"), std::string::npos);
  EXPECT_NE(refusal(whole, {"latency=1"}).find("unknown key"), std::string::npos);
}

TEST(Machine, RatesFollowTheTypeAndTheVerb) {
  Machine machine = free_machine();
  machine.flops = {100, 200};
  machine.attend_of_peak = 0.5;
  machine.attend_grad_of_peak = 0.25;
  EXPECT_EQ(machine.attend_rate(Verb::kAttend, DType::kF32), 50);
  EXPECT_EQ(machine.attend_rate(Verb::kAttendGrad, DType::kBF16), 50);
  EXPECT_EQ(machine.attend_rate(Verb::kAttendGrad, DType::kF16), 50);
  EXPECT_THROW(machine.attend_rate(Verb::kAttend, DType::kF64), Error);
}

TEST(Machine, ALinkIsFittedToItsMessages) {
  const auto timed = [](double latency, double bandwidth) {
    std::vector<LinkSample> samples;
    for (double bytes = 1024; bytes < 1e8; bytes *= 4) samples.push_back({bytes, latency + bytes / bandwidth});
    return samples;
  };
  const Link link = fit_link(timed(2e-5, 3e9));
  EXPECT_NEAR(link.latency_s, 2e-5, 1e-9);
  EXPECT_NEAR(link.bandwidth, 3e9, 1);
  std::vector<LinkSample> curved = timed(0, 3e9);  // caches: small messages pass faster than the line
  for (LinkSample& sample : curved) sample.seconds *= sample.bytes < 1e6 ? 0.5 : 1;
  EXPECT_EQ(fit_link(curved).latency_s, 0);
  EXPECT_GT(fit_link(curved).bandwidth, 3e9);
  EXPECT_LT(fit_link(curved).bandwidth, 6e9);
}

// Pairs of tiles, given as (row, column), of a region.
std::int64_t pairs_of(const std::set<std::pair<std::int64_t, std::int64_t>>& tiles, const TileSize& size,
                      const Region& region) {
  const auto extent = [&](std::int64_t number, std::int64_t of, std::int64_t count) {
    return size.clipped ? std::min(of, count - number * of) : of;
  };
  std::int64_t pairs = 0;
  for (const auto& [row, column] : tiles)
    pairs += extent(row, size.rows, region.q.count()) * extent(column, size.keys, region.k.count());
  return pairs;
}

// Whole tiles against a count over all pairs.
TEST(Machine, WorkedPairsAreThoseOfTouchedTiles) {
  std::mt19937 random(1);
  const auto from = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  int bands = 0;
  while (bands < 500) {
    const std::int64_t q = from(0, 8), k = from(0, 8), lo = from(-30, 20);
    const Region region{{q, q + from(1, 30)}, {k, k + from(1, 30)}, lo, lo + from(0, 30)};
    const auto band = restrict_to(region, region.q, region.k);
    if (!band) continue;
    ++bands;
    Machine machine = free_machine();
    const TileSize size{from(1, 9), from(1, 9), from(0, 1) == 1};
    machine.tile = size;
    std::set<std::pair<std::int64_t, std::int64_t>> touched;
    for (std::int64_t i = band->q.begin; i < band->q.end; ++i) {
      for (std::int64_t j = band->k.begin; j < band->k.end; ++j) {
        if (band->contains(i, j)) touched.insert({(i - band->q.begin) / size.rows, (j - band->k.begin) / size.keys});
      }
    }
    const std::vector<Tile> tiles{{*band}};
    EXPECT_EQ(machine.worked_pairs(Verb::kAttend, tiles), pairs_of(touched, size, *band))
        << to_text(*band) << " in tiles of " << size.rows << " x " << size.keys;
    EXPECT_EQ(machine.worked_pairs(Verb::kAttendGrad, tiles), machine.worked_pairs(Verb::kAttend, tiles));
    machine.grad_tile = {.rows = 1, .keys = 1};
    EXPECT_EQ(machine.worked_pairs(Verb::kAttendGrad, tiles), area(*band));
    machine.tile.reset();
    EXPECT_EQ(machine.worked_pairs(Verb::kAttend, tiles), area(*band));
  }
}

TEST(Machine, WorkedPairsOfStairsAreThoseOfTouchedTiles) {
  std::mt19937 random(2);
  const auto from = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  int stairs = 0;
  while (stairs < 500) {
    const std::int64_t lo = from(-90, 20);
    const std::vector<Region> region{{{0, 200}, {0, 200}, lo, lo + from(0, 60)}};
    const Positions queries({{from(0, 9), from(2, 25), from(1, 8)}}), keys({{from(0, 9), from(2, 25), from(1, 8)}});
    const std::vector<Tile> tiles = make_tiles(region, queries, keys);
    if (tiles.empty() || !tiles[0].stairs()) continue;
    ++stairs;
    const Region& rows = tiles[0].rows;
    Machine machine = free_machine();
    const TileSize size{from(1, 9), from(1, 9), from(0, 1) == 1};
    machine.tile = size;
    std::set<std::pair<std::int64_t, std::int64_t>> touched;
    for (std::int64_t i = rows.q.begin; i < rows.q.end; ++i) {
      for (std::int64_t j = rows.k.begin; j < rows.k.end; ++j) {
        if (tiles[0].contains(i, j)) touched.insert({(i - rows.q.begin) / size.rows, (j - rows.k.begin) / size.keys});
      }
    }
    EXPECT_EQ(machine.worked_pairs(Verb::kAttend, tiles), pairs_of(touched, size, rows));
  }
}

}  // namespace
}  // namespace dattn
