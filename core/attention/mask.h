// Masks: who sees whom, stated over global positions. A mask kind is a function from the lengths of both axes to
// disjoint regions; nothing else in the library knows the kinds.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/attention/region.h"

namespace dattn {

struct Mask {
  enum class Kind { kFull, kCausal, kWindow, kDocuments, kRegions };

  Kind kind = Kind::kFull;
  std::int64_t left = -1;                // window: keys before the query that it sees; -1 = all
  std::int64_t right = -1;               // window: keys after the query that it sees; -1 = all
  std::vector<std::int64_t> cu_seqlens;  // documents: boundaries, first 0, ascending; what lies past the last sees nothing
  std::shared_ptr<const Mask> within;    // documents: the band inside each document (full, causal or window)
  std::vector<Region> regions;           // regions: any list of disjoint ones

  static Mask full() { return {}; }
  static Mask causal();
  static Mask window(std::int64_t left, std::int64_t right);
  static Mask documents(std::vector<std::int64_t> cu_seqlens, const Mask& within);
  static Mask of_regions(std::vector<Region> regions);

  std::string text() const;  // "window(left 128, right 0)"
};

std::string_view name_of(Mask::Kind kind);

// The mask as disjoint trimmed regions inside [0, seq_q) x [0, seq_kv); empty where nothing is visible.
// Throws Error(kBadInput) for unsorted boundaries, ranges outside the sequence, negative window sides other than -1,
// a `within` that is no band, and user regions that overlap (naming both).
std::vector<Region> compile(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv);

// The same for every batch row, rows that share their regions together.
CompiledMask compile_batch(const Mask& mask, std::int64_t batch, std::int64_t seq_q, std::int64_t seq_kv);

}  // namespace dattn
