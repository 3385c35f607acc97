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
  static constexpr std::array<std::pair<std::string_view, Mask::Kind>, 11> kAll{
      {{"full", Mask::Kind::kFull},
       {"causal", Mask::Kind::kCausal},
       {"causal_bottom_right", Mask::Kind::kCausalBottomRight},
       {"window", Mask::Kind::kWindow},
       {"documents", Mask::Kind::kDocuments},
       {"prefix", Mask::Kind::kPrefix},
       {"global", Mask::Kind::kGlobal},
       {"blocks", Mask::Kind::kBlocks},
       {"padding", Mask::Kind::kPadding},
       {"regions", Mask::Kind::kRegions},
       {"per_row", Mask::Kind::kPerRow}}};
};

template <>
struct ConfigNames<Mask::Align> {
  static constexpr std::array<std::pair<std::string_view, Mask::Align>, 2> kAll{
      {{"start", Mask::Align::kStart}, {"end", Mask::Align::kEnd}}};
};

template <>
struct ConfigNames<Mask::Overlap> {
  static constexpr std::array<std::pair<std::string_view, Mask::Overlap>, 2> kAll{
      {{"refuse", Mask::Overlap::kRefuse}, {"first", Mask::Overlap::kFirst}}};
};

struct RegionConfig {
  std::optional<std::vector<std::optional<std::int64_t>>> q;  // [begin, end), null = unbounded on that side
  std::optional<std::vector<std::optional<std::int64_t>>> k;
  std::optional<std::int64_t> lo;
  std::optional<std::int64_t> hi;
};

struct WindowConfig {
  std::optional<std::int64_t> left;
  std::optional<std::int64_t> right;
};

struct MaskConfig {
  Mask::Kind kind = Mask::Kind::kCausal;
  std::optional<std::int64_t> left;
  std::optional<std::int64_t> right;
  std::optional<Mask::Align> align;
  std::optional<std::vector<std::int64_t>> cu_seqlens;
  std::optional<std::vector<std::int64_t>> cu_seqlens_kv;
  std::shared_ptr<MaskConfig> within;
  std::optional<std::int64_t> length;
  std::optional<std::int64_t> tokens;
  std::optional<WindowConfig> window;
  std::optional<bool> causal;
  std::optional<std::int64_t> size;
  std::optional<std::vector<std::vector<std::int64_t>>> list;
  std::optional<std::vector<std::int64_t>> lengths;
  std::optional<std::vector<RegionConfig>> regions;
  std::optional<Mask::Overlap> overlap;
  std::optional<std::vector<MaskConfig>> masks;
};

struct AttentionDropoutConfig {
  double p = 0;
  std::int64_t seed = 0;
};

struct AttentionConfig {
  MaskConfig mask;
  std::optional<double> softmax_scale;
  std::optional<double> softcap;
  std::optional<std::vector<double>> alibi_slopes;
  AttentionDropoutConfig dropout;
};

template <class V>
void describe(V& v, RegionConfig& c) {
  v("q", c.q, "query positions [begin, end), half-open; null = unbounded");
  v("k", c.k, "key positions [begin, end), half-open; null = unbounded");
  v("lo", c.lo, "least k - q that is seen; null = unbounded");
  v("hi", c.hi, "greatest k - q that is seen; null = unbounded");
}

template <class V>
void describe(V& v, WindowConfig& c) {
  v("left", c.left, "keys before the query that it sees; -1 or absent = all");
  v("right", c.right, "keys after the query that it sees; -1 or absent = all");
}

template <class V>
void describe(V& v, MaskConfig& c) {
  v("kind", c.kind, "who sees whom; the keys below belong to the kinds they name");
  v("left", c.left, "window: keys before the query that it sees; -1 or absent = all");
  v("right", c.right, "window: keys after the query that it sees; -1 or absent = all");
  v("align", c.align, "causal, window: start or absent = first query beside first key; end = last beside last");
  v("cu_seqlens", c.cu_seqlens, "documents: boundaries, ascending from 0; positions past the last see nothing");
  v("cu_seqlens_kv", c.cu_seqlens_kv, "documents: boundaries of the keys, as many as cu_seqlens; absent = cu_seqlens");
  v("within", c.within, "documents, padding: the band inside each (full, causal, causal_bottom_right, window); absent = full");
  v("length", c.length, "prefix: keys that every query sees, beside the earlier ones");
  v("tokens", c.tokens, "global: first positions that all see and, unless causal, that see all");
  v("window", c.window, "global: what the other positions see");
  v("causal", c.causal, "global: true = no query sees a later key; absent = false");
  v("size", c.size, "blocks: positions of one block on both sides; the last may have fewer");
  v("list", c.list, "blocks: the visible ones, each [query block, key block], counted from 0");
  v("lengths", c.lengths, "padding: valid positions of each batch row; queries and keys past them see nothing");
  v("regions", c.regions, "regions: rectangles of positions, each with a band lo <= k - q <= hi");
  v("overlap", c.overlap, "regions: refuse or absent = must be disjoint; first = a pair belongs to the first that shows it");
  v("masks", c.masks, "per_row: the mask of each batch row, of any kind but padding and per_row");
}

template <class V>
void describe(V& v, AttentionDropoutConfig& c) {
  v("p", c.p, "probability of dropping a query and key pair; keyed by global positions, so the same on every mesh");
  v("seed", c.seed, "the same seed drops the same pairs");
}

template <class V>
void describe(V& v, AttentionConfig& c) {
  v("mask", c.mask, "the mask; positions start at 0 on both sides");
  v("softmax_scale", c.softmax_scale, "factor of the scores before the softmax; absent = 1 / sqrt(head dim)");
  v("softcap", c.softcap, "scores become softcap * tanh(score / softcap); absent = no cap");
  v("alibi_slopes", c.alibi_slopes, "one slope per query head: slope * (k - q) is added to scores; absent = none");
  v("dropout", c.dropout, "dropout of attention probabilities, in training and in one attention call");
}

void check(const RegionConfig& c, const ConfigCheck& at);
void check(const WindowConfig& c, const ConfigCheck& at);
void check(const MaskConfig& c, const ConfigCheck& at);  // refuses keys of another kind, and what the kind lacks
void check(const AttentionDropoutConfig& c, const ConfigCheck& at);
void check(const AttentionConfig& c, const ConfigCheck& at);

// Lengths are needed because a null end of a region's range means the end of its axis.
Mask to_mask(const MaskConfig& config, std::int64_t seq_q, std::int64_t seq_kv);

}  // namespace dattn
