// Layout: which positions of a sequence each part of the sequence axis holds. Any length works on any number of parts;
// parts differ by at most one row (contiguous, striped) or two (zigzag).
//
//   P = 2, S = 8     contiguous  0 0 0 0 1 1 1 1
//                    zigzag      0 0 1 1 1 1 0 0     (part i holds chunks i and 2P-1-i of 2P: causal work is balanced)
//                    striped     0 1 0 1 0 1 0 1
//                    balanced    blocks of rows, shared out so that every part sees as many pairs of this very mask
// Sources: zigzag as in Megatron-Core's context parallelism; striped: Brandon et al., "Striped Attention", 2023.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/attention/region.h"

namespace dattn {

enum class Layout { kContiguous, kZigzag, kStriped, kBalanced };

std::string_view name_of(Layout layout);
Layout layout_from(std::string_view name);  // throws Error(kBadInput) naming the known ones

// The positions of part `index` of `parts` of a sequence of `length` positions; any layout but balanced.
Positions positions_of(Layout layout, std::int64_t length, int parts, int index);

// The positions of all parts in layout balanced: the query rows are cut into kBalancedBlocks blocks a part, on more than
// kBalancedBlocksInAll / kBalancedBlocks parts into about kBalancedBlocksInAll, but at least 8 a part. Every part gets as many
// of them (or one less), heaviest first to the lightest part, then blocks are exchanged while that helps. Where a part then
// still sees more than 1 / 0.98 of the mean, the heavy blocks are cut finer, into 64 pieces a part at most. The search for
// equal work with equal memory is that of MagiAttention (Zilong Wang et al., 2025).
inline constexpr std::int64_t kBalancedBlocks = 32, kBalancedBlocksInAll = 1 << 15;
std::vector<Positions> balanced_positions(const CompiledMask& mask, std::int64_t length, int parts);

}  // namespace dattn
