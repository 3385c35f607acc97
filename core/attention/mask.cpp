#include "core/attention/mask.h"

#include <algorithm>

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

struct Band {
  std::int64_t lo = -kUnbounded;
  std::int64_t hi = kUnbounded;
};

Band band_of(const Mask& mask) {
  switch (mask.kind) {
    case Mask::Kind::kFull: return {};
    case Mask::Kind::kCausal: return {-kUnbounded, 0};
    case Mask::Kind::kWindow:
      require(mask.left >= -1 && mask.right >= -1, "mask window has left {} and right {}; use sizes >= 0, or -1 for unlimited",
              mask.left, mask.right);
      return {mask.left < 0 ? -kUnbounded : -mask.left, mask.right < 0 ? kUnbounded : mask.right};
    default: fail(ErrorCode::kBadInput, "mask kind '{}' is no band; use full, causal or window", name_of(mask.kind));
  }
}

void append(std::vector<Region>& all, const Region& region) {
  if (const auto trimmed = restrict_to(region, region.q, region.k)) all.push_back(*trimmed);
}

std::vector<Region> compile_documents(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  const auto& bounds = mask.cu_seqlens;
  require(bounds.size() >= 2 && bounds.front() == 0,
          "mask documents needs cu_seqlens that start at 0 and have at least 2 entries; got {} entries{}", bounds.size(),
          bounds.empty() ? "" : fmt::format(" starting at {}", bounds.front()));
  const Band band = band_of(mask.within ? *mask.within : Mask::full());
  std::vector<Region> all;
  for (std::size_t i = 1; i < bounds.size(); ++i) {
    require(bounds[i] >= bounds[i - 1], "mask documents: cu_seqlens[{}] = {} is less than cu_seqlens[{}] = {}; sort them", i,
            bounds[i], i - 1, bounds[i - 1]);
    const Interval q{std::min(bounds[i - 1], seq_q), std::min(bounds[i], seq_q)};
    const Interval k{std::min(bounds[i - 1], seq_kv), std::min(bounds[i], seq_kv)};
    append(all, {q, k, band.lo, band.hi});
  }
  require(bounds.back() <= std::max(seq_q, seq_kv), "mask documents: cu_seqlens ends at {} but the sequence has {} positions",
          bounds.back(), std::max(seq_q, seq_kv));
  return all;
}

std::vector<Region> compile_regions(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  std::vector<Region> all;
  for (std::size_t i = 0; i < mask.regions.size(); ++i) {
    const Region& region = mask.regions[i];
    require(region.q.begin >= 0 && region.q.begin <= region.q.end && region.q.end <= seq_q,
            "mask region {} has q [{}, {}] but the queries are [0, {}]", i, region.q.begin, region.q.end, seq_q);
    require(region.k.begin >= 0 && region.k.begin <= region.k.end && region.k.end <= seq_kv,
            "mask region {} has k [{}, {}] but the keys are [0, {}]", i, region.k.begin, region.k.end, seq_kv);
    append(all, region);
  }
  // Overlap is looked for among regions that share query rows: a sweep over their starts.
  std::sort(all.begin(), all.end(), [](const Region& a, const Region& b) { return a.q.begin < b.q.begin; });
  std::vector<const Region*> open;
  for (const Region& region : all) {
    std::erase_if(open, [&](const Region* other) { return other->q.end <= region.q.begin; });
    for (const Region* other : open) {
      const auto both = intersect(region, *other);
      require(!both, "mask regions {} and {} overlap, first at query {}; make them disjoint", to_text(*other), to_text(region),
              both ? both->q.begin : 0);
    }
    open.push_back(&region);
  }
  return all;
}

}  // namespace

Mask Mask::causal() {
  Mask mask;
  mask.kind = Kind::kCausal;
  return mask;
}

Mask Mask::window(std::int64_t left, std::int64_t right) {
  Mask mask;
  mask.kind = Kind::kWindow;
  mask.left = left;
  mask.right = right;
  return mask;
}

Mask Mask::documents(std::vector<std::int64_t> cu_seqlens, const Mask& within) {
  Mask mask;
  mask.kind = Kind::kDocuments;
  mask.cu_seqlens = std::move(cu_seqlens);
  mask.within = std::make_shared<const Mask>(within);
  return mask;
}

Mask Mask::of_regions(std::vector<Region> regions) {
  Mask mask;
  mask.kind = Kind::kRegions;
  mask.regions = std::move(regions);
  return mask;
}

std::string_view name_of(Mask::Kind kind) {
  switch (kind) {
    case Mask::Kind::kFull: return "full";
    case Mask::Kind::kCausal: return "causal";
    case Mask::Kind::kWindow: return "window";
    case Mask::Kind::kDocuments: return "documents";
    case Mask::Kind::kRegions: return "regions";
  }
  return "?";
}

std::string Mask::text() const {
  switch (kind) {
    case Kind::kWindow: return fmt::format("window(left {}, right {})", left, right);
    case Kind::kDocuments: return fmt::format("documents({}, {})", cu_seqlens.size() - 1, within ? within->text() : "full");
    case Kind::kRegions: return fmt::format("regions({})", regions.size());
    default: return std::string(name_of(kind));
  }
}

std::vector<Region> compile(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  require(seq_q >= 0 && seq_kv >= 0 && seq_q <= kMaxPosition && seq_kv <= kMaxPosition,
          "sequence lengths {} and {} must lie in [0, {}]", seq_q, seq_kv, kMaxPosition);
  if (mask.kind == Mask::Kind::kDocuments) return compile_documents(mask, seq_q, seq_kv);
  if (mask.kind == Mask::Kind::kRegions) return compile_regions(mask, seq_q, seq_kv);
  const Band band = band_of(mask);
  std::vector<Region> all;
  append(all, {{0, seq_q}, {0, seq_kv}, band.lo, band.hi});
  return all;
}

CompiledMask compile_batch(const Mask& mask, std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv) {
  return {{{0, batch}, compile(mask, seq_q, seq_kv)}};
}

}  // namespace dattn
