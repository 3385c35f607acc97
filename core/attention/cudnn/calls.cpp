#include "core/attention/cudnn/calls.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn::cudnn {
namespace {

// A region and where its keys lie.
struct Part {
  Region rows;
  std::int64_t k_position = 0;
  std::int64_t step = 1;
};

// The least and the greatest k - q of a trimmed region.
std::int64_t lowest(const Region& r) { return r.lo > -kUnbounded ? r.lo : r.k.begin - (r.q.end - 1); }
std::int64_t highest(const Region& r) { return r.hi < kUnbounded ? r.hi : r.k.end - 1 - r.q.begin; }

bool go_on_evenly(const Part& a, const Part& b) {
  if (b.rows.k.count() > 1 && a.rows.k.count() > 1 && a.step != b.step) return false;
  const std::int64_t step = a.rows.k.count() > 1 ? a.step : b.step;
  return b.k_position - a.k_position == (b.rows.k.begin - a.rows.k.begin) * step;
}

// The union of two disjoint parts where it is a part: the least band around both holds nothing more.
std::optional<Part> joined(const Part& a, const Part& b, bool positional) {
  const Part& first = a.rows.k.begin <= b.rows.k.begin ? a : b;
  if (positional && !go_on_evenly(first, &first == &a ? b : a)) return std::nullopt;
  const Interval q{std::min(a.rows.q.begin, b.rows.q.begin), std::max(a.rows.q.end, b.rows.q.end)};
  const Interval k{std::min(a.rows.k.begin, b.rows.k.begin), std::max(a.rows.k.end, b.rows.k.end)};
  const Region around{q, k, std::min(lowest(a.rows), lowest(b.rows)), std::max(highest(a.rows), highest(b.rows))};
  if (area(around) != area(a.rows) + area(b.rows)) return std::nullopt;
  const auto trimmed = restrict_to(around, q, k);
  const std::int64_t step = a.rows.k.count() > 1 ? a.step : b.step;
  return Part{*trimmed, first.k_position, step};
}

Band band_of(const Part& part) {
  const Region& r = part.rows;
  const std::int64_t diagonal = r.q.begin - r.k.begin;  // what k - q loses when both are counted from the ranges' begins
  Band band{r.q, r.k, std::nullopt, std::nullopt, part.k_position, part.step};
  if (r.lo > -kUnbounded) band.left = 1 - (r.lo + diagonal);
  if (r.hi < kUnbounded) band.right = r.hi + diagonal;
  return band;
}

void append(const Part& part, std::vector<Band>& bands) {
  const Region& r = part.rows;
  const std::int64_t surplus = r.q.count() - r.k.count();
  if (r.lo == -kUnbounded || surplus <= 0) return bands.push_back(band_of(part));
  // The left bound cuts nothing off the surplus rows, since with it the last row still sees a key: both cuts begin at k.begin.
  for (const Interval q : {Interval{r.q.begin, r.q.begin + surplus}, Interval{r.q.begin + surplus, r.q.end}}) {
    bands.push_back(band_of({*restrict_to(r, q, r.k), part.k_position, part.step}));
  }
}

template <class Args>
Support suits_either(const Args& args) {
  const auto no = [](std::string why) { return Support{false, std::move(why)}; };
  if (args.invariant) return no("sums of cuDNN are not those of other meshes (determinism invariant)");
  if (args.terms.dropout.p > 0) return no("its dropout is not keyed by position");
  if (args.terms.softcap != 0) return no("it takes a softcap only without a mask");
  if (!args.terms.alibi_slopes.empty()) return no("its ALiBi has slopes and positions of its own");
  if (args.q.size(1) < kFewestRows)
    return no(fmt::format("{} query rows; a plan for each length would cost more", args.q.size(1)));
  const TensorView& bias = args.terms.bias;
  if (bias.data != nullptr && bias.dtype != args.q.dtype) return no("a bias of another type than q");
  if (args.tiles.size() > kMostTiles) return no(fmt::format("{} tiles, more than {}", args.tiles.size(), kMostTiles));
  const auto stairs = [](const Tile& tile) { return tile.stairs(); };
  if (std::any_of(args.tiles.begin(), args.tiles.end(), stairs)) return no("queries and keys of unequal steps under a bound");
  const std::vector<Band> bands = bands_of(args.tiles, bias.data != nullptr);
  if (bands.size() > kMostBands) return no(fmt::format("{} bands, more than {}", bands.size(), kMostBands));
  const auto strided = [](const Band& band) { return band.step != 1; };
  if (bias.data != nullptr && std::any_of(bands.begin(), bands.end(), strided)) return no("a bias of positions with a step");
  return {};
}

}  // namespace

std::vector<Band> bands_of(std::span<const Tile> tiles, bool positional) {
  std::vector<Part> parts;
  for (const Tile& tile : tiles) {
    ensure(!tile.stairs(), "stairs are no bands of cuDNN");
    Part part{tile.rows, tile.k_position, tile.rows.k.count() > 1 ? tile.k_step : 1};
    for (std::size_t i = 0; i < parts.size();) {  // what was joined may join others
      if (const auto both = joined(parts[i], part, positional)) {
        part = *both;
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i));
        i = 0;
      } else {
        ++i;
      }
    }
    parts.push_back(part);
  }
  std::vector<Band> bands;
  for (const Part& part : parts) append(part, bands);
  return bands;
}

std::vector<HeadGroup> head_groups(const HeadMap& heads, std::int64_t count) {
  std::vector<HeadGroup> groups;
  const auto add = [&](std::int64_t begin, std::int64_t end) {
    if (begin < end) groups.push_back({{begin, end}, {heads.kv_of(begin), heads.kv_of(end - 1) + 1}});
  };
  // A group of which some heads are elsewhere, whole groups, another such group.
  const std::int64_t first_whole = std::min(count, (heads.group - heads.q_begin % heads.group) % heads.group);
  const std::int64_t last_whole = first_whole + (count - first_whole) / heads.group * heads.group;
  add(0, first_whole);
  add(first_whole, last_whole);
  add(last_whole, count);
  return groups;
}

Support suits(const AttendArgs& args) { return suits_either(args); }

Support suits(const AttendGradArgs& args) {
  if (args.dbias.data != nullptr) return {false, "it gives no gradient of the bias"};
  return suits_either(args);
}

}  // namespace dattn::cudnn
