// From logits to a token. The random number is a pure function of (seed, index of the token), so the same seed gives
// the same text on any mesh and after any interruption.
// Sources: Fan et al., "Hierarchical neural story generation", 2018 (top-k); Holtzman et al., "The curious case of
// neural text degeneration", 2020 (top-p).
#pragma once

#include <cstdint>
#include <span>

namespace dattn {

struct SamplingOptions {
  bool greedy = false;
  double temperature = 1.0;  // > 0; towards 0 the choice becomes greedy
  std::int64_t top_k = 0;    // only the k likeliest tokens; 0 = all
  double top_p = 1.0;        // only the likeliest tokens that together hold this much probability
  std::uint64_t seed = 1;
};

void check(const SamplingOptions& options);  // throws Error(kBadInput) naming the option

// The token for logits [vocabulary]; `index` counts the tokens of this text. Ties go to the lower token.
std::int32_t sample(std::span<const float> logits, const SamplingOptions& options, std::uint64_t index);

}  // namespace dattn
