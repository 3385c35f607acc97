#include "core/config/attention_config.h"

#include <algorithm>
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

// A key and the kinds it belongs to.
struct KeyOwners {
  std::string_view key;
  std::vector<Mask::Kind> kinds;
};

void check_owners(const MaskConfig& c, const ConfigCheck& at) {
  using Kind = Mask::Kind;
  static const std::vector<KeyOwners> kOwners{{"left", {Kind::kWindow}},
                                              {"right", {Kind::kWindow}},
                                              {"align", {Kind::kCausal, Kind::kWindow}},
                                              {"cu_seqlens", {Kind::kDocuments}},
                                              {"cu_seqlens_kv", {Kind::kDocuments}},
                                              {"within", {Kind::kDocuments, Kind::kPadding}},
                                              {"length", {Kind::kPrefix}},
                                              {"tokens", {Kind::kGlobal}},
                                              {"window", {Kind::kGlobal}},
                                              {"causal", {Kind::kGlobal}},
                                              {"size", {Kind::kBlocks}},
                                              {"list", {Kind::kBlocks}},
                                              {"lengths", {Kind::kPadding}},
                                              {"regions", {Kind::kRegions}},
                                              {"overlap", {Kind::kRegions}},
                                              {"masks", {Kind::kPerRow}}};
  for (const auto& [key, kinds] : kOwners) {
    if (!at.given(key) || std::find(kinds.begin(), kinds.end(), c.kind) != kinds.end()) continue;
    std::string owners;
    for (const Kind kind : kinds) owners += (owners.empty() ? "" : " and ") + std::string(name_of(kind));
    at.require(key, false, "belongs to mask kind {}, but {} is {}", owners, at.name("kind"), name_of(c.kind));
  }
}

// The keys that a kind cannot do without.
void check_needed(const MaskConfig& c, const ConfigCheck& at) {
  const auto need = [&](Mask::Kind kind, std::string_view key, bool present, std::string_view what) {
    at.require(key, c.kind != kind || present, "is missing; mask kind {} needs {}", name_of(kind), what);
  };
  need(Mask::Kind::kDocuments, "cu_seqlens", c.cu_seqlens.has_value(), "the boundaries, such as [0, 100, 256]");
  need(Mask::Kind::kPrefix, "length", c.length.has_value(), "the number of keys that every query sees");
  need(Mask::Kind::kGlobal, "tokens", c.tokens.has_value(), "the number of first positions that all see");
  need(Mask::Kind::kGlobal, "window", c.window.has_value(), "what the other positions see, such as {left: 128, right: 0}");
  need(Mask::Kind::kBlocks, "size", c.size.has_value(), "the positions of one block");
  need(Mask::Kind::kBlocks, "list", c.list.has_value(), "the visible blocks, such as [[0, 0], [1, 0]]");
  need(Mask::Kind::kPadding, "lengths", c.lengths.has_value(), "the valid positions of each batch row, such as [100, 256]");
  need(Mask::Kind::kRegions, "regions", c.regions.has_value(), "a list, which may be empty");
  need(Mask::Kind::kPerRow, "masks", c.masks.has_value(), "the mask of each batch row");
}

void check_side(const std::optional<std::int64_t>& side, std::string_view key, const ConfigCheck& at) {
  at.require(key, !side || (*side >= -1 && *side <= kMaxPosition), "must be a size >= 0, or -1 for all");
}

void check_size(const std::optional<std::int64_t>& size, std::int64_t least, std::string_view key, const ConfigCheck& at) {
  at.require(key, !size || (*size >= least && *size <= kMaxPosition), "must lie in [{}, {}]", least, kMaxPosition);
}

void check_boundaries(const std::optional<std::vector<std::int64_t>>& bounds, std::string_view key, const ConfigCheck& at) {
  if (!bounds) return;
  at.require(key, bounds->size() >= 2 && bounds->front() == 0, "must start at 0 and hold at least 2 boundaries");
  for (std::size_t i = 1; i < bounds->size(); ++i) {
    at.require(key, bounds->at(i) >= bounds->at(i - 1) && bounds->at(i) <= kMaxPosition,
               "must ascend to at most {}: entry {} is {} and entry {} is {}", kMaxPosition, i - 1, bounds->at(i - 1), i,
               bounds->at(i));
  }
}

void check_entries(const MaskConfig& c, const ConfigCheck& at) {
  if (c.lengths) {
    for (std::size_t i = 0; i < c.lengths->size(); ++i) {
      const std::int64_t length = c.lengths->at(i);
      at.require("lengths", length >= 0 && length <= kMaxPosition, "has entry {} = {}; lengths lie in [0, {}]", i, length,
                 kMaxPosition);
    }
  }
  if (c.list) {
    for (std::size_t i = 0; i < c.list->size(); ++i) {
      at.require("list", c.list->at(i).size() == 2, "needs [query block, key block]; entry {} is a list of {}", i,
                 c.list->at(i).size());
    }
  }
  if (c.masks) {
    for (std::size_t i = 0; i < c.masks->size(); ++i) {
      const Mask::Kind kind = c.masks->at(i).kind;
      at.require("masks", !depends_on_row(kind), "has entry {} of kind {}; use kinds other than padding and per_row", i,
                 name_of(kind));
    }
  }
}

template <class T>
T given(const std::optional<T>& value) {
  return value.value_or(T{});
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

void check(const WindowConfig& c, const ConfigCheck& at) {
  check_side(c.left, "left", at);
  check_side(c.right, "right", at);
}

void check(const MaskConfig& c, const ConfigCheck& at) {
  check_owners(c, at);
  check_needed(c, at);
  check_side(c.left, "left", at);
  check_side(c.right, "right", at);
  check_size(c.length, 0, "length", at);
  check_size(c.tokens, 0, "tokens", at);
  check_size(c.size, 1, "size", at);
  check_boundaries(c.cu_seqlens, "cu_seqlens", at);
  check_boundaries(c.cu_seqlens_kv, "cu_seqlens_kv", at);
  const std::size_t q_bounds = c.cu_seqlens ? c.cu_seqlens->size() : 0;
  const std::size_t k_bounds = c.cu_seqlens_kv ? c.cu_seqlens_kv->size() : q_bounds;
  at.require("cu_seqlens_kv", k_bounds == q_bounds, "has {} entries and cu_seqlens {}; give both the same number of documents",
             k_bounds, q_bounds);
  at.require("within", !c.within || is_band(c.within->kind),
             "has kind {}; inside {} use full, causal, causal_bottom_right or window", c.within ? name_of(c.within->kind) : "",
             name_of(c.kind));
  check_entries(c, at);
}

void check(const AttentionDropoutConfig& c, const ConfigCheck& at) {
  at.require("p", c.p >= 0 && c.p < 1, "must lie in [0, 1)");
  at.require("seed", c.seed >= 0, "must be at least 0");
}

void check(const AttentionConfig& c, const ConfigCheck& at) {
  at.require("softmax_scale", !c.softmax_scale || *c.softmax_scale > 0, "must be greater than 0");
  at.require("softcap", !c.softcap || *c.softcap > 0, "must be greater than 0; leave it out for no cap");
}

Mask to_mask(const MaskConfig& config, std::int64_t seq_q, std::int64_t seq_kv) {
  const auto inside = [&] { return config.within ? to_mask(*config.within, seq_q, seq_kv) : Mask::full(); };
  const Mask::Align align = config.align.value_or(Mask::Align::kStart);
  switch (config.kind) {
    case Mask::Kind::kFull: return Mask::full();
    case Mask::Kind::kCausal: return Mask::causal(align);
    case Mask::Kind::kCausalBottomRight: return Mask::causal_bottom_right();
    case Mask::Kind::kWindow: return Mask::window(config.left.value_or(-1), config.right.value_or(-1), align);
    case Mask::Kind::kDocuments: return Mask::documents(given(config.cu_seqlens), inside(), given(config.cu_seqlens_kv));
    case Mask::Kind::kPrefix: return Mask::prefix(given(config.length));
    case Mask::Kind::kGlobal: {
      const WindowConfig window = given(config.window);
      return Mask::global(given(config.tokens), window.left.value_or(-1), window.right.value_or(-1), given(config.causal));
    }
    case Mask::Kind::kBlocks: {
      std::vector<Mask::BlockPair> list;
      for (const auto& pair : given(config.list)) list.push_back({pair.at(0), pair.at(1)});
      return Mask::blocks(given(config.size), std::move(list));
    }
    case Mask::Kind::kPadding: return Mask::padding(given(config.lengths), inside());
    case Mask::Kind::kRegions: {
      std::vector<Region> regions;
      for (const RegionConfig& region : given(config.regions)) {
        regions.push_back({to_interval(region.q, seq_q), to_interval(region.k, seq_kv), region.lo.value_or(-kUnbounded),
                           region.hi.value_or(kUnbounded)});
      }
      return Mask::of_regions(std::move(regions), config.overlap.value_or(Mask::Overlap::kRefuse));
    }
    case Mask::Kind::kPerRow: {
      std::vector<Mask> rows;
      for (const MaskConfig& row : given(config.masks)) rows.push_back(to_mask(row, seq_q, seq_kv));
      return Mask::per_row(std::move(rows));
    }
  }
  fail(ErrorCode::kInternal, "mask kind {} has no config", static_cast<int>(config.kind));
}

}  // namespace dattn
