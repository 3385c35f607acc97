// Which probabilities dropout keeps: one 24-bit uniform number for each (stream, batch row and head, query position, key
// position), from Philox4x32. A block of counter {stream, row * heads + head, query, key / 4} serves four neighbouring
// keys; the counters are distinct, so no two pairs share a number.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "core/attention/kernel.h"
#include "core/base/philox.h"

namespace dattn {

inline constexpr std::int64_t kDropoutPositions = std::int64_t{1} << 31;  // what the counter has room for

// A pair is dropped where the upper 24 bits of its word are less: uniform01(word) < p.
inline std::uint32_t drop_below(const AttentionDropout& dropout) {
  return static_cast<std::uint32_t>(std::ceil(dropout.p * 0x1p24));
}

// The counter's number of local batch row `b` and global query head `head`.
inline std::uint32_t dropout_row(const AttentionDropout& dropout, std::int64_t b, std::int64_t head) {
  return static_cast<std::uint32_t>((dropout.batch_begin + b) * dropout.heads + head);
}

// Local batch row b, global query head, global positions.
inline bool keeps(const AttentionDropout& dropout, std::int64_t b, std::int64_t head, std::int64_t query, std::int64_t key) {
  const PhiloxBlock words = philox4x32(dropout.seed, {static_cast<std::uint32_t>(dropout.stream), dropout_row(dropout, b, head),
                                                      static_cast<std::uint32_t>(query), static_cast<std::uint32_t>(key / 4)});
  return words[static_cast<std::size_t>(key % 4)] >> 8 >= drop_below(dropout);
}

}  // namespace dattn
