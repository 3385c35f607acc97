#include "plugins/train/ngram.h"

#include <cmath>
#include <vector>

#include "core/base/error.h"

namespace dattn {

double ngram_bits(std::span<const std::uint8_t> train, std::span<const std::uint8_t> held_out, std::int64_t vocabulary,
                  int order, double smoothing) {
  require(order >= 1 && order <= 3, "an n-gram of order {}; 1, 2 and 3 are counted", order);
  require(vocabulary >= 1 && vocabulary <= 256 && smoothing > 0, "an n-gram needs 1 to 256 symbols (has {}) and smoothing > 0",
          vocabulary);
  const auto symbols = static_cast<std::size_t>(vocabulary);
  const auto history = static_cast<std::size_t>(order) - 1;
  require(held_out.size() > history, "an n-gram of order {} needs more than {} held-out symbols", order, held_out.size());
  std::size_t contexts = 1;
  for (std::size_t i = 0; i < history; ++i) contexts *= symbols;
  std::vector<std::uint32_t> counts(contexts * symbols, 0);
  std::vector<std::uint32_t> totals(contexts, 0);
  const auto context_at = [&](std::span<const std::uint8_t> text, std::size_t at) {
    std::size_t context = 0;
    for (std::size_t i = at - history; i < at; ++i) context = context * symbols + text[i];
    return context;
  };
  for (std::size_t at = history; at < train.size(); ++at) {
    const std::size_t context = context_at(train, at);
    ++counts[context * symbols + train[at]];
    ++totals[context];
  }
  double bits = 0;
  for (std::size_t at = history; at < held_out.size(); ++at) {
    const std::size_t context = context_at(held_out, at);
    const double seen = counts[context * symbols + held_out[at]];
    bits -= std::log2((seen + smoothing) / (totals[context] + smoothing * static_cast<double>(vocabulary)));
  }
  return bits / static_cast<double>(held_out.size() - history);
}

}  // namespace dattn
