#include "parallel/machine.h"

#include <algorithm>

#include "core/base/error.h"

namespace dattn {
namespace {

// How far tiles reach that end at `end`, of a band of `count` rows.
std::int64_t reach(std::int64_t end, std::int64_t count, bool clipped) { return clipped ? std::min(end, count) : end; }

// Pairs of the tiles that a band touches: for each row of tiles the keys that its queries see are one range.
std::int64_t touched_pairs(const Region& band, const TileSize& tile) {
  std::int64_t pairs = 0;
  for (std::int64_t row = 0; row < band.q.count(); row += tile.rows) {
    const std::int64_t first = band.q.begin + row, last = std::min(first + tile.rows, band.q.end) - 1;
    const std::int64_t first_key = std::max(band.k.begin, first + band.lo), last_key = std::min(band.k.end - 1, last + band.hi);
    if (first_key > last_key) continue;
    const std::int64_t begin = (first_key - band.k.begin) / tile.keys * tile.keys;
    const std::int64_t end = ((last_key - band.k.begin) / tile.keys + 1) * tile.keys;
    pairs += (reach(row + tile.rows, band.q.count(), tile.clipped) - row) * (reach(end, band.k.count(), tile.clipped) - begin);
  }
  return pairs;
}

// The same of stairs, row by row of the side with fewer: begins and ends of what rows see ascend, with gaps between them.
std::int64_t touched_by_stairs(const Tile& stairs, const TileSize& tile) {
  const Interval q = stairs.rows.q, k = stairs.rows.k;
  if (q.count() > k.count()) return touched_by_stairs(transposed(stairs), {tile.keys, tile.rows, tile.clipped});
  std::int64_t pairs = 0, height = 0, next = 0;  // of this row of tiles, those of keys before `next` are counted
  for (std::int64_t row = 0; row < q.count(); ++row) {
    if (row % tile.rows == 0) {
      next = 0;
      height = reach(row + tile.rows, q.count(), tile.clipped) - row;
    }
    const Interval keys = keys_of(stairs, q.begin + row);
    if (keys.count() == 0) continue;
    next = std::max(next, (keys.begin - k.begin) / tile.keys);
    const std::int64_t end = (keys.end - 1 - k.begin) / tile.keys + 1;
    if (end <= next) continue;
    pairs += height * (reach(end * tile.keys, k.count(), tile.clipped) - next * tile.keys);
    next = end;
  }
  return pairs;
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
