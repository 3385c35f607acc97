#include "parallel/machine.h"

#include <algorithm>

#include "core/base/error.h"

namespace dattn {
namespace {

// Pairs of the tiles that a band touches: for each row of tiles the keys that its queries see are one range.
std::int64_t touched_pairs(const Region& band, const TileSize& tile) {
  std::int64_t tiles = 0;
  for (std::int64_t row = band.q.begin; row < band.q.end; row += tile.rows) {
    const std::int64_t last = std::min(row + tile.rows, band.q.end) - 1;
    const std::int64_t first_key = std::max(band.k.begin, row + band.lo), last_key = std::min(band.k.end - 1, last + band.hi);
    if (first_key > last_key) continue;
    tiles += (last_key - band.k.begin) / tile.keys - (first_key - band.k.begin) / tile.keys + 1;
  }
  return tiles * tile.rows * tile.keys;
}

// The same of stairs, row by row of the side with fewer: begins and ends of what rows see ascend, with gaps between them.
std::int64_t touched_by_stairs(const Tile& stairs, const TileSize& tile) {
  if (stairs.rows.q.count() > stairs.rows.k.count()) return touched_by_stairs(transposed(stairs), {tile.keys, tile.rows});
  std::int64_t tiles = 0, next = 0;  // of this row of tiles, those of keys before `next` are counted
  for (std::int64_t row = stairs.rows.q.begin; row < stairs.rows.q.end; ++row) {
    if ((row - stairs.rows.q.begin) % tile.rows == 0) next = 0;
    const Interval keys = keys_of(stairs, row);
    if (keys.count() == 0) continue;
    next = std::max(next, (keys.begin - stairs.rows.k.begin) / tile.keys);
    const std::int64_t end = (keys.end - 1 - stairs.rows.k.begin) / tile.keys + 1;
    tiles += std::max<std::int64_t>(0, end - next);
    next = std::max(next, end);
  }
  return tiles * tile.rows * tile.keys;
}

}  // namespace

double Machine::attend_rate(Verb verb, DType storage) const {
  require(storage == DType::kF32 || is_half(storage), "machine {} has rates of fp32, and of bf16 and fp16, not of {}", name,
          name_of(storage));
  const double peak = storage == DType::kF32 ? flops.fp32 : flops.bf16;
  return peak * (verb == Verb::kAttendGrad ? attend_grad_of_peak : attend_of_peak);
}

std::int64_t Machine::worked_pairs(Verb verb, std::span<const Tile> tiles) const {
  const std::optional<TileSize>& size = verb == Verb::kAttendGrad && grad_tile ? grad_tile : tile;
  if (!size) return area(tiles);
  std::int64_t pairs = 0;
  for (const Tile& part : tiles) pairs += part.stairs() ? touched_by_stairs(part, *size) : touched_pairs(part.rows, *size);
  return pairs;
}

Machine load_machine(const std::string& path) { return load_config<Machine>(path); }

Link fit_link(const std::vector<LinkSample>& samples) {
  double w = 0, wx = 0, wy = 0, wxx = 0, wxy = 0;
  for (const LinkSample& sample : samples) {
    const double weight = 1 / (sample.seconds * sample.seconds);
    w += weight;
    wx += weight * sample.bytes;
    wy += weight * sample.seconds;
    wxx += weight * sample.bytes * sample.bytes;
    wxy += weight * sample.bytes * sample.seconds;
  }
  const double latency = (wy * wxx - wx * wxy) / (w * wxx - wx * wx);
  if (!(latency >= 0)) return {0, wxx / wxy, std::nullopt};
  return {latency, wxx / (wxy - latency * wx), std::nullopt};
}

void check(const Rates& c, const ConfigCheck& at) {
  at.require("fp32", c.fp32 > 0, "must be greater than 0");
  at.require("bf16", c.bf16 > 0, "must be greater than 0");
}

void check(const TileSize& c, const ConfigCheck& at) {
  at.require("rows", c.rows >= 1, "must be at least 1");
  at.require("keys", c.keys >= 1, "must be at least 1");
}

void check(const Link& c, const ConfigCheck& at) {
  at.require("latency_s", c.latency_s >= 0, "must be at least 0");
  at.require("bandwidth", c.bandwidth > 0, "must be greater than 0");
  at.require("node_bandwidth", !c.node_bandwidth || *c.node_bandwidth > 0, "must be greater than 0");
}

void check(const Machine& c, const ConfigCheck& at) {
  const auto is_share = [](double share) { return share > 0 && share <= 1; };
  at.require("ranks_per_node", c.ranks_per_node >= 1, "must be at least 1");
  at.require("memory_bytes", c.memory_bytes > 0, "must be greater than 0");
  at.require("flops", at.given("flops"), "must be given: {{fp32: .., bf16: ..}} in FLOP/s");
  at.require("attend_of_peak", is_share(c.attend_of_peak), "must lie in (0, 1]");
  at.require("attend_grad_of_peak", is_share(c.attend_grad_of_peak), "must lie in (0, 1]");
  at.require("memory_bandwidth", c.memory_bandwidth > 0, "must be greater than 0");
  at.require("kernel_latency_s", c.kernel_latency_s >= 0, "must be at least 0");
  at.require("links", c.links.inside.bandwidth > 0, "must give inside: {{latency_s: .., bandwidth: ..}}");
}

std::string machine_schema() {
  return schema_page("Keys of a machine file",
                     "Made from the structs by the tests (`DATTN_UPDATE=1`, `MachineSchema.*`); do not edit. Units: seconds, "
                     "bytes, bytes/s, FLOP/s.",
                     schema_of<Machine>());
}

}  // namespace dattn
