// What each mask kind means: its disjoint regions. A new kind is one function and one case here, its name in mask.cpp and
// its keys in core/config/attention_config.h.
#include <algorithm>

#include <fmt/format.h>

#include "core/attention/mask.h"
#include "core/base/error.h"

namespace dattn {
namespace {

using Kind = Mask::Kind;

struct Sides {
  std::int64_t lo = -kUnbounded;
  std::int64_t hi = kUnbounded;
};

Sides window_sides(const Mask& mask) {
  require(mask.left >= -1 && mask.right >= -1, "mask {} has left {} and right {}; use sizes >= 0, or -1 for unlimited",
          name_of(mask.kind), mask.left, mask.right);
  return {mask.left < 0 ? -kUnbounded : -mask.left, mask.right < 0 ? kUnbounded : mask.right};
}

Sides sides_of(const Mask& band) {
  switch (band.kind) {
    case Kind::kFull: return {};
    case Kind::kCausal:
    case Kind::kCausalBottomRight: return {-kUnbounded, 0};
    case Kind::kWindow: return window_sides(band);
    default:
      fail(ErrorCode::kBadInput, "mask kind '{}' is no band; use full, causal, causal_bottom_right or window",
           name_of(band.kind));
  }
}

void require_sane(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  require(seq_q >= 0 && seq_kv >= 0 && seq_q <= kMaxPosition && seq_kv <= kMaxPosition,
          "sequence lengths {} and {} must lie in [0, {}]", seq_q, seq_kv, kMaxPosition);
  require(mask.align == Mask::Align::kStart || is_band(mask.kind),
          "mask kind '{}' has no align; set it on causal or window masks", name_of(mask.kind));
}

void append(std::vector<Region>& all, const Region& region) {
  if (const auto trimmed = restrict_to(region, region.q, region.k)) all.push_back(*trimmed);
}

// A band inside a rectangle, whose first queries and keys (align end: last ones) lie on the band's diagonal.
void append_band(std::vector<Region>& all, const Mask& band, Interval q, Interval k) {
  const Sides sides = sides_of(band);
  const bool end = band.align == Mask::Align::kEnd || band.kind == Kind::kCausalBottomRight;
  const std::int64_t diagonal = end ? k.end - q.count() : k.begin;  // the key that lies on it beside the first query
  append(all, shift({{0, q.count()}, {k.begin - diagonal, k.end - diagonal}, sides.lo, sides.hi}, q.begin, diagonal));
}

void require_boundaries(const std::vector<std::int64_t>& bounds, std::string_view name) {
  require(bounds.size() >= 2 && bounds.front() == 0,
          "mask documents needs {} that start at 0 and have at least 2 entries; got {} entries{}", name, bounds.size(),
          bounds.empty() ? "" : fmt::format(" starting at {}", bounds.front()));
  for (std::size_t i = 1; i < bounds.size(); ++i) {
    require(bounds[i] >= bounds[i - 1], "mask documents: {0}[{1}] = {2} is less than {0}[{3}] = {4}; sort them", name, i,
            bounds[i], i - 1, bounds[i - 1]);
  }
}

std::vector<Region> compile_documents(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  const bool shared = mask.cu_seqlens_kv.empty();
  const auto& q_bounds = mask.cu_seqlens;
  const auto& k_bounds = shared ? mask.cu_seqlens : mask.cu_seqlens_kv;
  require_boundaries(q_bounds, "cu_seqlens");
  if (!shared) require_boundaries(k_bounds, "cu_seqlens_kv");
  require(q_bounds.size() == k_bounds.size(),
          "mask documents: cu_seqlens has {} entries and cu_seqlens_kv {}; give both the same number of documents",
          q_bounds.size(), k_bounds.size());
  // Shared boundaries may end with the longer side; the shorter one then has fewer positions in the last documents.
  const std::int64_t q_length = shared ? std::max(seq_q, seq_kv) : seq_q;
  require(q_bounds.back() <= q_length,
          "mask documents: cu_seqlens ends at {} but the sequence has {} positions; end it at {} or before", q_bounds.back(),
          q_length, q_length);
  require(shared || k_bounds.back() <= seq_kv,
          "mask documents: cu_seqlens_kv ends at {} but there are {} keys; end it at {} or before", k_bounds.back(), seq_kv,
          seq_kv);
  const Mask within = mask.within ? *mask.within : Mask::full();
  std::vector<Region> all;
  for (std::size_t i = 1; i < q_bounds.size(); ++i) {
    append_band(all, within, {std::min(q_bounds[i - 1], seq_q), std::min(q_bounds[i], seq_q)},
                {std::min(k_bounds[i - 1], seq_kv), std::min(k_bounds[i], seq_kv)});
  }
  return all;
}

std::vector<Region> compile_prefix(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  require(mask.length >= 0 && mask.length <= seq_kv, "mask prefix has length {} but there are {} keys; use 0 to {}",
          mask.length, seq_kv, seq_kv);
  std::vector<Region> all;
  append(all, {{0, seq_q}, {0, mask.length}});
  append(all, {{0, seq_q}, {mask.length, seq_kv}, -kUnbounded, 0});
  return all;
}

std::vector<Region> compile_global(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t most = mask.past_only ? seq_kv : std::max(seq_q, seq_kv);  // the side that they name
  require(mask.tokens >= 0 && mask.tokens <= most, "mask global has tokens {} but the sequence has {} positions; use 0 to {}",
          mask.tokens, most, most);
  const Sides sides = window_sides(mask);
  const std::int64_t keys = std::min(mask.tokens, seq_kv);
  const std::int64_t queries = mask.past_only ? 0 : std::min(mask.tokens, seq_q);  // that see everything
  const std::int64_t highest = mask.past_only ? 0 : kUnbounded;
  std::vector<Region> all;
  append(all, {{0, queries}, {0, seq_kv}});
  append(all, {{queries, seq_q}, {0, keys}, -kUnbounded, highest});
  append(all, {{queries, seq_q}, {keys, seq_kv}, sides.lo, std::min(sides.hi, highest)});
  return all;
}

std::vector<Region> compile_blocks(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  require(mask.size >= 1 && mask.size <= kMaxPosition, "mask blocks has size {}; use 1 to {}", mask.size, kMaxPosition);
  const auto blocks_in = [&](std::int64_t length) { return (length + mask.size - 1) / mask.size; };
  for (std::size_t i = 0; i < mask.list.size(); ++i) {
    const auto [q, k] = mask.list[i];
    require(
        q >= 0 && q < blocks_in(seq_q) && k >= 0 && k < blocks_in(seq_kv),
        "mask blocks: entry {} is [{}, {}], but {} queries and {} keys have {} and {} blocks of size {}; use [0, 0] to [{}, "
        "{}]",
        i, q, k, seq_q, seq_kv, blocks_in(seq_q), blocks_in(seq_kv), mask.size, blocks_in(seq_q) - 1, blocks_in(seq_kv) - 1);
  }
  std::vector<Mask::BlockPair> sorted = mask.list;
  std::sort(sorted.begin(), sorted.end());
  std::vector<Region> all;
  for (std::size_t first = 0, next = 0; first < sorted.size(); first = next) {  // [first, next): one row, consecutive keys
    const auto [q, k] = sorted[first];
    for (next = first + 1; next < sorted.size() && sorted[next][0] == q; ++next) {
      require(sorted[next] != sorted[next - 1], "mask blocks lists [{}, {}] twice; name each block once", q, sorted[next][1]);
      if (sorted[next][1] != sorted[next - 1][1] + 1) break;
    }
    append(all, {{q * mask.size, std::min((q + 1) * mask.size, seq_q)},
                 {k * mask.size, std::min((sorted[next - 1][1] + 1) * mask.size, seq_kv)}});
  }
  return all;
}

// Calls visit(i, j, shared), i < j, for regions that share a pair: a sweep over their first queries.
template <class Visit>
void for_each_overlap(const std::vector<Region>& all, Visit&& visit) {
  std::vector<std::size_t> order(all.size()), open;
  for (std::size_t i = 0; i < all.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return all[a].q.begin < all[b].q.begin; });
  for (const std::size_t i : order) {
    std::erase_if(open, [&](std::size_t other) { return all[other].q.end <= all[i].q.begin; });
    for (const std::size_t other : open) {
      if (const auto shared = intersect(all[i], all[other])) visit(std::min(i, other), std::max(i, other), *shared);
    }
    open.push_back(i);
  }
}

// Each region less the earlier ones that it meets.
std::vector<Region> first_wins(const std::vector<Region>& all) {
  std::vector<std::vector<std::size_t>> earlier(all.size());
  for_each_overlap(all, [&](std::size_t i, std::size_t j, const Region&) { earlier[j].push_back(i); });
  std::vector<Region> disjoint;
  for (std::size_t j = 0; j < all.size(); ++j) {
    std::vector<Region> parts{all[j]};
    for (const std::size_t i : earlier[j]) {
      std::vector<Region> left;
      for (const Region& part : parts) {
        for (const Region& piece : subtract(part, all[i])) left.push_back(piece);
      }
      parts = std::move(left);
    }
    disjoint.insert(disjoint.end(), parts.begin(), parts.end());
  }
  return disjoint;
}

std::vector<Region> compile_regions(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  std::vector<Region> all;
  for (std::size_t i = 0; i < mask.regions.size(); ++i) {
    const Region& region = mask.regions[i];
    require(region.q.begin >= 0 && region.q.begin <= region.q.end && region.q.end <= seq_q,
            "mask region {} has q [{}, {}] but the queries are [0, {}]; write 0 <= begin <= end <= {}", i, region.q.begin,
            region.q.end, seq_q, seq_q);
    require(region.k.begin >= 0 && region.k.begin <= region.k.end && region.k.end <= seq_kv,
            "mask region {} has k [{}, {}] but the keys are [0, {}]; write 0 <= begin <= end <= {}", i, region.k.begin,
            region.k.end, seq_kv, seq_kv);
    append(all, region);
  }
  if (mask.overlap == Mask::Overlap::kFirst) {
    all = first_wins(all);
  } else {
    for_each_overlap(all, [&](std::size_t i, std::size_t j, const Region& shared) {
      fail(ErrorCode::kBadInput, "mask regions {} and {} overlap, first at query {}; make them disjoint, or set overlap: first",
           to_text(all[i]), to_text(all[j]), shared.q.begin);
    });
  }
  std::stable_sort(all.begin(), all.end(), [](const Region& a, const Region& b) { return a.q.begin < b.q.begin; });
  return all;
}

// One batch row with `length` valid positions on both sides.
std::vector<Region> compile_padding_row(const Mask& mask, std::size_t row, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t length = mask.lengths[row], longest = std::max(seq_q, seq_kv);
  require(length >= 0 && length <= longest, "mask padding: lengths[{}] = {} but the sequence has {} positions; use 0 to {}",
          row, length, longest, longest);
  std::vector<Region> all;
  append_band(all, mask.within ? *mask.within : Mask::full(), {0, std::min(length, seq_q)}, {0, std::min(length, seq_kv)});
  return all;
}

std::vector<Region> compile_row(const Mask& mask, std::size_t row, std::int64_t seq_q, std::int64_t seq_kv) {
  if (mask.kind == Kind::kPadding) return compile_padding_row(mask, row, seq_q, seq_kv);
  require(!depends_on_row(mask.rows[row].kind),
          "mask per_row: entry {} has kind '{}'; use a kind that is the same for all rows", row, name_of(mask.rows[row].kind));
  return compile(mask.rows[row], seq_q, seq_kv);
}

}  // namespace

std::vector<Region> compile(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  require_sane(mask, seq_q, seq_kv);
  std::vector<Region> all;
  switch (mask.kind) {
    case Kind::kFull:
    case Kind::kCausal:
    case Kind::kCausalBottomRight:
    case Kind::kWindow: append_band(all, mask, {0, seq_q}, {0, seq_kv}); return all;
    case Kind::kDocuments: return compile_documents(mask, seq_q, seq_kv);
    case Kind::kPrefix: return compile_prefix(mask, seq_q, seq_kv);
    case Kind::kGlobal: return compile_global(mask, seq_q, seq_kv);
    case Kind::kBlocks: return compile_blocks(mask, seq_q, seq_kv);
    case Kind::kRegions: return compile_regions(mask, seq_q, seq_kv);
    case Kind::kPadding:
    case Kind::kPerRow: break;
  }
  fail(ErrorCode::kBadInput,
       "mask kind '{}' differs between batch rows, but one mask for all rows is needed here; use another kind",
       name_of(mask.kind));
}

CompiledMask compile_batch(const Mask& mask, std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv) {
  require(batch >= 0, "a batch of {} rows; use a number >= 0", batch);
  if (!depends_on_row(mask.kind)) return {{{0, batch}, compile(mask, seq_q, seq_kv)}};
  require_sane(mask, seq_q, seq_kv);
  const std::size_t entries = mask.kind == Kind::kPadding ? mask.lengths.size() : mask.rows.size();
  require(static_cast<std::int64_t>(entries) == batch,
          "mask {} has {} entries but the batch has {} rows; give one for each row", name_of(mask.kind), entries, batch);
  CompiledMask all;
  for (std::size_t row = 0; row < entries; ++row) {
    const auto begin = static_cast<std::int64_t>(row);
    std::vector<Region> regions = compile_row(mask, row, seq_q, seq_kv);
    if (!all.empty() && all.back().regions == regions) {
      all.back().batch.end = begin + 1;
    } else {
      all.push_back({{begin, begin + 1}, std::move(regions)});
    }
  }
  return all;
}

}  // namespace dattn
