// The config's `attention` section: the mask by kind, and the scale of the scores.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/attention/mask.h"
#include "core/config/config.h"

namespace dattn {

template <>
struct ConfigNames<Mask::Kind> {
  static constexpr std::array<std::pair<std::string_view, Mask::Kind>, 5> kAll{{{"full", Mask::Kind::kFull},
                                                                                {"causal", Mask::Kind::kCausal},
                                                                                {"window", Mask::Kind::kWindow},
                                                                                {"documents", Mask::Kind::kDocuments},
                                                                                {"regions", Mask::Kind::kRegions}}};
};

struct RegionConfig {
  std::optional<std::vector<std::optional<std::int64_t>>> q;  // [begin, end), null = unbounded on that side
  std::optional<std::vector<std::optional<std::int64_t>>> k;
  std::optional<std::int64_t> lo;
  std::optional<std::int64_t> hi;
};

struct MaskConfig {
  Mask::Kind kind = Mask::Kind::kCausal;
  std::optional<std::int64_t> left;
  std::optional<std::int64_t> right;
  std::optional<std::vector<std::int64_t>> cu_seqlens;
  std::shared_ptr<MaskConfig> within;
  std::optional<std::vector<RegionConfig>> regions;
};

struct AttentionConfig {
  MaskConfig mask;
  std::optional<double> softmax_scale;
};

template <class V>
void describe(V& v, RegionConfig& c) {
  v("q", c.q, "query positions [begin, end), half-open; null = unbounded");
  v("k", c.k, "key positions [begin, end), half-open; null = unbounded");
  v("lo", c.lo, "least k - q that is seen; null = unbounded");
  v("hi", c.hi, "greatest k - q that is seen; null = unbounded");
}

template <class V>
void describe(V& v, MaskConfig& c) {
  v("kind", c.kind, "who sees whom; the keys below belong to the kind they name");
  v("left", c.left, "window: keys before the query that it sees; -1 or absent = all");
  v("right", c.right, "window: keys after the query that it sees; -1 or absent = all");
  v("cu_seqlens", c.cu_seqlens, "documents: boundaries, ascending from 0; positions past the last see nothing");
  v("within", c.within, "documents: the mask inside each document (full, causal or window); absent = full");
  v("regions", c.regions, "regions: disjoint rectangles of positions, each with a band lo <= k - q <= hi");
}

template <class V>
void describe(V& v, AttentionConfig& c) {
  v("mask", c.mask, "the mask; positions start at 0 on both sides");
  v("softmax_scale", c.softmax_scale, "factor of the scores before the softmax; absent = 1 / sqrt(head dim)");
}

void check(const RegionConfig& c, const ConfigCheck& at);
void check(const MaskConfig& c, const ConfigCheck& at);  // refuses keys of another kind, and what the kind lacks
void check(const AttentionConfig& c, const ConfigCheck& at);

// Lengths are needed because a null end of a region's range means the end of its axis.
Mask to_mask(const MaskConfig& config, std::int64_t seq_q, std::int64_t seq_kv);

}  // namespace dattn
