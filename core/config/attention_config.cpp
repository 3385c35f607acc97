#include "core/config/attention_config.h"

#include <cmath>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

using Range = std::optional<std::vector<std::optional<std::int64_t>>>;

void check_range(const Range& range, std::string_view key, const ConfigCheck& at) {
  if (!range) return;
  at.require(key, range->size() == 2, "needs [begin, end], not a list of {}", range->size());
  const std::int64_t begin = range->at(0).value_or(0);
  at.require(key, begin >= 0 && begin <= kMaxPosition, "begins at {}; positions lie in [0, {}]", begin, kMaxPosition);
  if (!range->at(1)) return;
  const std::int64_t end = *range->at(1);
  at.require(key, end >= begin && end <= kMaxPosition, "is [{}, {}]; write begin <= end <= {}", begin, end, kMaxPosition);
}

// A bound far outside every sequence is no bound; below that, sums of bounds and positions cannot overflow.
void check_bound(const std::optional<std::int64_t>& bound, std::string_view key, const ConfigCheck& at) {
  at.require(key, !bound || std::abs(static_cast<double>(*bound)) <= static_cast<double>(kMaxPosition),
             "must lie in [-{0}, {0}]; write null for no bound", kMaxPosition);
}

Interval to_interval(const Range& range, std::int64_t length) {
  if (!range) return {0, length};
  const std::int64_t begin = range->at(0).value_or(0);
  return {begin, range->at(1).value_or(std::max(begin, length))};
}

}  // namespace

void check(const RegionConfig& c, const ConfigCheck& at) {
  check_range(c.q, "q", at);
  check_range(c.k, "k", at);
  check_bound(c.lo, "lo", at);
  check_bound(c.hi, "hi", at);
}

void check(const MaskConfig& c, const ConfigCheck& at) {
  const auto belongs = [&](std::string_view key, Mask::Kind kind) {
    at.require(key, c.kind == kind || !at.given(key), "belongs to mask kind {}, but {} is {}", name_of(kind), at.name("kind"),
               name_of(c.kind));
  };
  belongs("left", Mask::Kind::kWindow);
  belongs("right", Mask::Kind::kWindow);
  belongs("cu_seqlens", Mask::Kind::kDocuments);
  belongs("within", Mask::Kind::kDocuments);
  belongs("regions", Mask::Kind::kRegions);
  for (const auto& [key, side] : {std::pair("left", c.left), std::pair("right", c.right)}) {
    at.require(key, !side || (*side >= -1 && *side <= kMaxPosition), "must be a size >= 0, or -1 for all");
  }
  if (c.kind == Mask::Kind::kDocuments) {
    at.require("cu_seqlens", c.cu_seqlens.has_value(),
               "is missing; mask kind documents needs the boundaries, such as [0, 100, 256]");
    const auto& bounds = *c.cu_seqlens;
    at.require("cu_seqlens", bounds.size() >= 2 && bounds.front() == 0, "must start at 0 and hold at least 2 boundaries");
    for (std::size_t i = 1; i < bounds.size(); ++i) {
      at.require("cu_seqlens", bounds[i] >= bounds[i - 1] && bounds[i] <= kMaxPosition,
                 "must ascend: entry {} is {} and entry {} is {}", i - 1, bounds[i - 1], i, bounds[i]);
    }
    const bool band = !c.within || (c.within->kind != Mask::Kind::kDocuments && c.within->kind != Mask::Kind::kRegions);
    at.require("within", band, "has kind {}; inside documents use full, causal or window", band ? "" : name_of(c.within->kind));
  }
  at.require("regions", c.kind != Mask::Kind::kRegions || c.regions,
             "is missing; mask kind regions needs a list, which may be empty");
}

void check(const AttentionConfig& c, const ConfigCheck& at) {
  at.require("softmax_scale", !c.softmax_scale || *c.softmax_scale > 0, "must be greater than 0");
}

Mask to_mask(const MaskConfig& config, std::int64_t seq_q, std::int64_t seq_kv) {
  switch (config.kind) {
    case Mask::Kind::kFull: return Mask::full();
    case Mask::Kind::kCausal: return Mask::causal();
    case Mask::Kind::kWindow: return Mask::window(config.left.value_or(-1), config.right.value_or(-1));
    case Mask::Kind::kDocuments:
      return Mask::documents(config.cu_seqlens.value_or(std::vector<std::int64_t>{}),
                             config.within ? to_mask(*config.within, seq_q, seq_kv) : Mask::full());
    case Mask::Kind::kRegions: break;
  }
  std::vector<Region> regions;
  for (const RegionConfig& region : config.regions.value_or(std::vector<RegionConfig>{})) {
    regions.push_back({to_interval(region.q, seq_q), to_interval(region.k, seq_kv), region.lo.value_or(-kUnbounded),
                       region.hi.value_or(kUnbounded)});
  }
  return Mask::of_regions(std::move(regions));
}

}  // namespace dattn
