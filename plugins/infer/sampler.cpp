// From logits to a token (see sampler.h).
#include "plugins/infer/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/base/error.h"
#include "core/base/philox.h"

namespace dattn {
namespace {

constexpr std::uint64_t kSamplingStream = 0x53414d50;  // keeps these numbers apart from those of weights and data

}  // namespace

void check(const SamplingOptions& options) {
  require(options.temperature > 0, "temperature is {}; use a value above 0, or --greedy", options.temperature);
  require(options.top_k >= 0, "top_k is {}; use 0 for all tokens or a positive count", options.top_k);
  require(options.top_p > 0 && options.top_p <= 1, "top_p is {}; use a value in (0, 1]", options.top_p);
}

std::int32_t sample(std::span<const float> logits, const SamplingOptions& options, std::uint64_t index) {
  ensure(!logits.empty(), "sampling from an empty vocabulary");
  if (options.greedy) return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());

  std::vector<std::int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto likelier = [&](std::int32_t a, std::int32_t b) {
    const float la = logits[static_cast<std::size_t>(a)], lb = logits[static_cast<std::size_t>(b)];
    return la != lb ? la > lb : a < b;
  };
  std::size_t kept = tokens.size();
  if (options.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(options.top_k));
  std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end(), likelier);
  tokens.resize(kept);

  const double top = logits[static_cast<std::size_t>(tokens.front())];
  std::vector<double> weights;
  double total = 0;
  for (const std::int32_t token : tokens) {
    weights.push_back(std::exp((logits[static_cast<std::size_t>(token)] - top) / options.temperature));
    total += weights.back();
  }
  double nucleus = 0;
  for (kept = 0; kept < weights.size() && (kept == 0 || nucleus < options.top_p * total); ++kept) nucleus += weights[kept];

  double left = philox_uniform(options.seed, kSamplingStream, index) * nucleus;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) return tokens[i];
  }
  return tokens[kept - 1];
}

}  // namespace dattn
