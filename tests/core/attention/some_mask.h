// Random masks of every kind, each beside its meaning pair by pair, which is stated without regions.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "core/attention/mask.h"
#include "tests/core/random.h"

namespace dattn {

// Whether query q of n_q sees key k of n_k.
using Sees = std::function<bool(std::int64_t q, std::int64_t k, std::int64_t n_q, std::int64_t n_k)>;

struct MaskCase {
  Mask mask;
  Sees sees;
};

constexpr std::int64_t kLongest = 17;

inline MaskCase some_band() {
  const bool end = pick(0, 2) == 1;
  const Mask::Align align = end ? Mask::Align::kEnd : Mask::Align::kStart;
  const auto left = pick(-1, kLongest + 3), right = pick(-1, kLongest + 3);
  switch (pick(0, 5)) {
    case 0: return {Mask::full(), [](auto, auto, auto, auto) { return true; }};
    case 1: return {Mask::causal(align), [=](auto q, auto k, auto n_q, auto n_k) { return end ? n_k - k >= n_q - q : k <= q; }};
    case 2: return {Mask::causal_bottom_right(), [](auto q, auto k, auto n_q, auto n_k) { return n_k - k >= n_q - q; }};
    default:
      return {Mask::window(left, right, align), [=](auto q, auto k, auto n_q, auto n_k) {
                const auto after = end ? (n_q - q) - (n_k - k) : k - q;  // how far the key lies behind the query
                return (left < 0 || after >= -left) && (right < 0 || after <= right);
              }};
  }
}

// Boundaries within [0, end], the first 0.
inline std::vector<std::int64_t> some_boundaries(std::int64_t count, std::int64_t end) {
  std::vector<std::int64_t> bounds{0};
  for (; count > 0; --count) bounds.push_back(pick(0, end + 1));
  std::sort(bounds.begin(), bounds.end());
  return bounds;
}

// The document of a position, from a walk over the boundaries; -1 past the last.
inline std::int64_t document_of(const std::vector<std::int64_t>& bounds, std::int64_t position) {
  for (std::size_t i = 1; i < bounds.size(); ++i) {
    if (position < bounds[i]) return static_cast<std::int64_t>(i) - 1;
  }
  return -1;
}

inline MaskCase some_documents(std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t count = pick(1, 6);
  const bool shared = pick(0, 2) == 0;
  const MaskCase within = some_band();
  const auto q_bounds = some_boundaries(count, shared ? std::max(seq_q, seq_kv) : seq_q);
  const auto k_bounds = shared ? q_bounds : some_boundaries(count, seq_kv);
  const auto sees = [=](std::int64_t q, std::int64_t k, std::int64_t n_q, std::int64_t n_k) {
    const std::int64_t document = document_of(q_bounds, q);
    if (document < 0 || document != document_of(k_bounds, k)) return false;
    const auto i = static_cast<std::size_t>(document);
    return within.sees(q - q_bounds[i], k - k_bounds[i], std::min(q_bounds[i + 1], n_q) - q_bounds[i],
                       std::min(k_bounds[i + 1], n_k) - k_bounds[i]);
  };
  return {Mask::documents(q_bounds, within.mask, shared ? std::vector<std::int64_t>{} : k_bounds), sees};
}

inline MaskCase some_prefix(std::int64_t seq_kv) {
  const auto length = pick(0, seq_kv + 1);
  return {Mask::prefix(length), [=](auto q, auto k, auto, auto) { return k <= q || k < length; }};
}

inline MaskCase some_global(std::int64_t seq_q, std::int64_t seq_kv) {
  const bool past_only = pick(0, 2) == 1;
  const auto tokens = pick(0, (past_only ? seq_kv : std::max(seq_q, seq_kv)) + 1);
  const auto left = pick(-1, kLongest), right = pick(-1, kLongest);
  return {Mask::global(tokens, left, right, past_only), [=](auto q, auto k, auto, auto) {
            if (past_only && k > q) return false;
            const bool near = (left < 0 || q - k <= left) && (right < 0 || k - q <= right);
            return near || k < tokens || (!past_only && q < tokens);
          }};
}

inline MaskCase some_blocks(std::int64_t seq_q, std::int64_t seq_kv) {
  const auto size = pick(1, kLongest + 2);
  std::vector<Mask::BlockPair> list;
  for (std::int64_t q = 0; q * size < seq_q; ++q) {
    for (std::int64_t k = 0; k * size < seq_kv; ++k) {
      if (pick(0, 2) == 0) list.insert(list.begin() + pick(0, static_cast<std::int64_t>(list.size()) + 1), {q, k});
    }
  }
  return {Mask::blocks(size, list), [=](auto q, auto k, auto, auto) {
            return std::find(list.begin(), list.end(), Mask::BlockPair{q / size, k / size}) != list.end();
          }};
}

inline std::vector<Region> some_regions(std::int64_t seq_q, std::int64_t seq_kv) {
  std::vector<Region> regions;
  for (std::int64_t i = pick(0, 6); i > 0; --i) {
    Region region{pick_interval(seq_q), pick_interval(seq_kv)};
    if (pick(0, 3) > 0) region.lo = pick(-12, 9);
    if (pick(0, 3) > 0) region.hi = std::max<std::int64_t>(region.lo, -12) + pick(-1, 9);
    regions.push_back(region);
  }
  return regions;
}

inline MaskCase some_union_of_regions(std::int64_t seq_q, std::int64_t seq_kv) {
  const auto regions = some_regions(seq_q, seq_kv);
  return {Mask::of_regions(regions, Mask::Overlap::kFirst), [=](auto q, auto k, auto, auto) {
            return std::any_of(regions.begin(), regions.end(), [&](const Region& region) { return region.contains(q, k); });
          }};
}

// Any kind that does not depend on the batch row.
inline MaskCase some_mask(std::int64_t seq_q, std::int64_t seq_kv) {
  switch (pick(0, 6)) {
    case 0: return some_band();
    case 1: return some_documents(seq_q, seq_kv);
    case 2: return some_prefix(seq_kv);
    case 3: return some_global(seq_q, seq_kv);
    case 4: return some_blocks(seq_q, seq_kv);
    default: return some_union_of_regions(seq_q, seq_kv);
  }
}

// Every pair lies in exactly one region where it is visible, in none where it is not; regions are trimmed and inside.
inline void assert_shows(const RegionList& regions, const Sees& sees, std::int64_t seq_q, std::int64_t seq_kv) {
  std::int64_t visible = 0;
  for (std::int64_t q = 0; q < seq_q; ++q) {
    for (std::int64_t k = 0; k < seq_kv; ++k) {
      const auto hits = std::count_if(regions.begin(), regions.end(), [&](const Region& r) { return r.contains(q, k); });
      RC_ASSERT(hits == (sees(q, k, seq_q, seq_kv) ? 1 : 0));
      visible += hits;
    }
  }
  RC_ASSERT(area(regions) == visible);
  for (const Region& region : regions) {
    RC_ASSERT(region.q.begin >= 0 && region.q.end <= seq_q && region.k.begin >= 0 && region.k.end <= seq_kv);
    RC_ASSERT(restrict_to(region, region.q, region.k) == region);
  }
}

}  // namespace dattn
