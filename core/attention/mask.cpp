// Masks as values: how they are made, named, printed and sliced. What they mean is in mask_kinds.cpp.
#include "core/attention/mask.h"

#include <fmt/format.h>

#include "core/base/error.h"

namespace dattn {
namespace {

Mask of_kind(Mask::Kind kind) {
  Mask mask;
  mask.kind = kind;
  return mask;
}

template <class T>
std::vector<T> part_of(const std::vector<T>& all, Interval rows, std::string_view kind) {
  require(rows.begin >= 0 && rows.begin <= rows.end && rows.end <= static_cast<std::int64_t>(all.size()),
          "batch rows [{}, {}) of a mask {} that has {} entries; give one entry for each batch row", rows.begin, rows.end, kind,
          all.size());
  return {all.begin() + rows.begin, all.begin() + rows.end};
}

}  // namespace

Mask Mask::causal(Align align) {
  Mask mask = of_kind(Kind::kCausal);
  mask.align = align;
  return mask;
}

Mask Mask::causal_bottom_right() { return of_kind(Kind::kCausalBottomRight); }

Mask Mask::window(std::int64_t left, std::int64_t right, Align align) {
  Mask mask = of_kind(Kind::kWindow);
  mask.left = left;
  mask.right = right;
  mask.align = align;
  return mask;
}

Mask Mask::documents(std::vector<std::int64_t> cu_seqlens, const Mask& within, std::vector<std::int64_t> cu_seqlens_kv) {
  Mask mask = of_kind(Kind::kDocuments);
  mask.cu_seqlens = std::move(cu_seqlens);
  mask.cu_seqlens_kv = std::move(cu_seqlens_kv);
  mask.within = std::make_shared<const Mask>(within);
  return mask;
}

Mask Mask::prefix(std::int64_t length) {
  Mask mask = of_kind(Kind::kPrefix);
  mask.length = length;
  return mask;
}

Mask Mask::global(std::int64_t tokens, std::int64_t left, std::int64_t right, bool past_only) {
  Mask mask = of_kind(Kind::kGlobal);
  mask.tokens = tokens;
  mask.left = left;
  mask.right = right;
  mask.past_only = past_only;
  return mask;
}

Mask Mask::blocks(std::int64_t size, std::vector<BlockPair> list) {
  Mask mask = of_kind(Kind::kBlocks);
  mask.size = size;
  mask.list = std::move(list);
  return mask;
}

Mask Mask::padding(std::vector<std::int64_t> lengths, const Mask& within) {
  Mask mask = of_kind(Kind::kPadding);
  mask.lengths = std::move(lengths);
  mask.within = std::make_shared<const Mask>(within);
  return mask;
}

Mask Mask::of_regions(std::vector<Region> regions, Overlap overlap) {
  Mask mask = of_kind(Kind::kRegions);
  mask.regions = std::move(regions);
  mask.overlap = overlap;
  return mask;
}

Mask Mask::per_row(std::vector<Mask> rows) {
  Mask mask = of_kind(Kind::kPerRow);
  mask.rows = std::move(rows);
  return mask;
}

std::string_view name_of(Mask::Kind kind) {
  switch (kind) {
    case Mask::Kind::kFull: return "full";
    case Mask::Kind::kCausal: return "causal";
    case Mask::Kind::kCausalBottomRight: return "causal_bottom_right";
    case Mask::Kind::kWindow: return "window";
    case Mask::Kind::kDocuments: return "documents";
    case Mask::Kind::kPrefix: return "prefix";
    case Mask::Kind::kGlobal: return "global";
    case Mask::Kind::kBlocks: return "blocks";
    case Mask::Kind::kPadding: return "padding";
    case Mask::Kind::kRegions: return "regions";
    case Mask::Kind::kPerRow: return "per_row";
  }
  return "?";
}

bool is_band(Mask::Kind kind) {
  return kind == Mask::Kind::kFull || kind == Mask::Kind::kCausal || kind == Mask::Kind::kCausalBottomRight ||
         kind == Mask::Kind::kWindow;
}

bool depends_on_row(Mask::Kind kind) { return kind == Mask::Kind::kPadding || kind == Mask::Kind::kPerRow; }

std::string Mask::text() const {
  const std::string inside = within ? within->text() : "full";
  const bool end = align == Align::kEnd;
  switch (kind) {
    case Kind::kCausal: return end ? "causal(align end)" : "causal";
    case Kind::kWindow: return fmt::format("window(left {}, right {}{})", left, right, end ? ", align end" : "");
    case Kind::kDocuments: return fmt::format("documents({}, {})", cu_seqlens.empty() ? 0 : cu_seqlens.size() - 1, inside);
    case Kind::kPrefix: return fmt::format("prefix({})", length);
    case Kind::kGlobal: return fmt::format("global({}, left {}, right {}{})", tokens, left, right, past_only ? ", causal" : "");
    case Kind::kBlocks: return fmt::format("blocks({} of size {})", list.size(), size);
    case Kind::kPadding: return fmt::format("padding({} rows, {})", lengths.size(), inside);
    case Kind::kRegions:
      return fmt::format("regions({}{})", regions.size(), overlap == Overlap::kFirst ? ", overlap first" : "");
    case Kind::kPerRow: return fmt::format("per_row({} rows)", rows.size());
    default: return std::string(name_of(kind));
  }
}

Mask batch_slice(const Mask& mask, Interval rows) {
  Mask slice = mask;
  if (mask.kind == Mask::Kind::kPadding) slice.lengths = part_of(mask.lengths, rows, "padding");
  if (mask.kind == Mask::Kind::kPerRow) slice.rows = part_of(mask.rows, rows, "per_row");
  return slice;
}

}  // namespace dattn
