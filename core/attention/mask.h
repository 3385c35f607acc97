// Masks: who sees whom, stated over global positions. A mask kind is a function from the lengths of both axes to
// disjoint regions; nothing else in the library knows the kinds. Two kinds, padding and per_row, differ between the
// rows of a batch. Sources: prefix-LM (Raffel et al. 2020), global tokens (Longformer, Beltagy et al. 2020; causal:
// StreamingLLM's sink tokens, Xiao et al. 2023), blocks (BigBird, Zaheer et al. 2020).
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/attention/region.h"

namespace dattn {

struct Mask {
  enum class Kind {
    kFull,
    kCausal,
    kCausalBottomRight,
    kWindow,
    kDocuments,
    kPrefix,
    kGlobal,
    kBlocks,
    kPadding,
    kRegions,
    kPerRow
  };
  enum class Align { kStart, kEnd };       // which positions of both sides a band puts on its diagonal: the first, the last
  enum class Overlap { kRefuse, kFirst };  // kFirst: a pair belongs to the first region that shows it
  using BlockPair = std::array<std::int64_t, 2>;  // query block, key block

  Kind kind = Kind::kFull;
  Align align = Align::kStart;              // causal, window
  std::int64_t left = -1;                   // window, global: keys before the query that it sees; -1 = all
  std::int64_t right = -1;                  // window, global: keys after the query that it sees; -1 = all
  std::vector<std::int64_t> cu_seqlens;     // documents: boundaries, first 0, ascending; what lies past the last sees nothing
  std::vector<std::int64_t> cu_seqlens_kv;  // documents: boundaries of the keys; empty = cu_seqlens
  std::shared_ptr<const Mask> within;       // documents, padding: the band inside each; null = full
  std::int64_t length = 0;                  // prefix: keys that every query sees
  std::int64_t tokens = 0;                  // global: first positions that are seen by all and, unless past_only, see all
  bool past_only = false;                   // global: k <= q for every pair
  std::int64_t size = 0;                    // blocks: positions of one block; the last may have fewer
  std::vector<BlockPair> list;              // blocks: the visible ones
  std::vector<std::int64_t> lengths;        // padding: valid positions of each batch row, on both sides
  std::vector<Region> regions;              // regions: any list
  Overlap overlap = Overlap::kRefuse;       // regions
  std::vector<Mask> rows;                   // per_row: the mask of each batch row

  static Mask full() { return {}; }
  static Mask causal(Align align = Align::kStart);
  static Mask causal_bottom_right();  // causal with align end
  static Mask window(std::int64_t left, std::int64_t right, Align align = Align::kStart);
  static Mask documents(std::vector<std::int64_t> cu_seqlens, const Mask& within, std::vector<std::int64_t> cu_seqlens_kv = {});
  static Mask prefix(std::int64_t length);
  static Mask global(std::int64_t tokens, std::int64_t left, std::int64_t right, bool past_only = false);
  static Mask blocks(std::int64_t size, std::vector<BlockPair> list);
  static Mask padding(std::vector<std::int64_t> lengths, const Mask& within = full());
  static Mask of_regions(std::vector<Region> regions, Overlap overlap = Overlap::kRefuse);
  static Mask per_row(std::vector<Mask> rows);

  std::string text() const;  // "window(left 128, right 0)"
};

std::string_view name_of(Mask::Kind kind);
bool is_band(Mask::Kind kind);         // full, causal, causal_bottom_right, window: what may stand inside documents and padding
bool depends_on_row(Mask::Kind kind);  // padding, per_row

// The mask as disjoint trimmed regions inside [0, seq_q) x [0, seq_kv); empty where nothing is visible.
// Throws Error(kBadInput) for kinds that depend on the batch row, unsorted boundaries, positions, blocks, a prefix or global
// tokens outside the sequence, negative sizes, a `within` that is no band, blocks listed twice, and user regions that overlap
// (naming both).
std::vector<Region> compile(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv);

// The same for every batch row in [0, batch): one entry where the mask does not depend on the row. Throws Error(kBadInput)
// also where padding or per_row have another number of entries than the batch has rows.
CompiledMask compile_batch(const Mask& mask, std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv);

// The mask of a slice of the batch: padding and per_row keep the entries of those rows, other kinds stay as they are.
Mask batch_slice(const Mask& mask, Interval rows);

}  // namespace dattn
