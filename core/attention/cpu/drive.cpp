#include "core/attention/cpu/drive.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "core/attention/dropout.h"
#include "core/base/error.h"

namespace dattn::cpu {

Rows rows_of(const TensorView& view, std::int64_t b, std::int64_t begin, std::int64_t count, std::int64_t h) {
  const std::int64_t offset = b * view.stride(0) + begin * view.stride(1) + h * view.stride(2);
  return {static_cast<const char*>(view.data) + offset * size_of(view.dtype), view.stride(1), count, view.size(3)};
}

Interval key_hull(std::span<const Tile> tiles, std::int64_t block) {
  if (tiles.empty()) return {0, 0};
  Interval hull = tiles.front().rows.k;
  for (const Tile& tile : tiles) {
    hull.begin = std::min(hull.begin, tile.rows.k.begin);
    hull.end = std::max(hull.end, tile.rows.k.end);
  }
  return {hull.begin / block * block, hull.end};
}

float base2_factor(double scale, const ScoreTerms& terms) {
  constexpr double kLog2e = 1.4426950408889634;
  if (terms.changes_scores()) return static_cast<float>(kLog2e);
  return std::max(static_cast<float>(std::abs(scale) * kLog2e), std::numeric_limits<float>::min());
}

Terms terms_of(const ScoreTerms& terms, double scale, const HeadMap& heads, std::int64_t b, std::int64_t row, std::int64_t h) {
  const std::int64_t head = heads.q_begin + h;
  Terms t{};
  t.scores = terms.changes_scores();
  t.factor = static_cast<float>(std::abs(scale) / (terms.softcap == 0 ? 1.0 : terms.softcap));
  t.softcap = static_cast<float>(terms.softcap);
  if (!terms.alibi_slopes.empty()) t.slope = static_cast<float>(terms.alibi_slopes[static_cast<std::size_t>(head)]);
  if (terms.bias.data != nullptr) {
    t.bias = bias_row(terms.bias, b, row, h);
    t.bias_stride = terms.bias.stride(1);
    t.bias_type = terms.bias.dtype == DType::kBF16  ? BiasType::kBF16
                  : terms.bias.dtype == DType::kF16 ? BiasType::kF16
                                                    : BiasType::kF32;
  }
  const AttentionDropout& dropout = terms.dropout;
  t.keep = static_cast<float>(1 / (1 - dropout.p));
  t.drop_below = drop_below(dropout);
  t.key[0] = static_cast<std::uint32_t>(dropout.seed);
  t.key[1] = static_cast<std::uint32_t>(dropout.seed >> 32);
  t.stream = static_cast<std::uint32_t>(dropout.stream);
  t.row = dropout_row(dropout, b, head);
  return t;
}

std::byte* bias_row(const TensorView& bias, std::int64_t b, std::int64_t row, std::int64_t h) {
  const std::int64_t offset =
      (bias.size(0) == 1 ? 0 : b) * bias.stride(0) + row * bias.stride(1) + (bias.size(2) == 1 ? 0 : h) * bias.stride(2);
  return static_cast<std::byte*>(bias.data) + offset * size_of(bias.dtype);
}

std::byte* scratch(std::int64_t bytes) {
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local std::int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    const std::int64_t rounded = padded_to(bytes, 64);
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>(rounded))));
    if (!memory) fail(ErrorCode::kSystem, "out of memory: {} bytes of scratch for the cpu attention kernel", bytes);
    size = rounded;
  }
  return memory.get();
}

}  // namespace dattn::cpu
