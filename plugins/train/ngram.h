// Bigram and trigram models over symbols: what a language model must beat to have learnt more than local counts.
#pragma once

#include <cstdint>
#include <span>

namespace dattn {

// Bits per symbol of `held_out` under p(c | last order - 1 symbols) = (count + smoothing) / (total + smoothing * vocabulary),
// counted on `train`. order 1, 2 or 3; symbols lie in [0, vocabulary), vocabulary <= 256. The first order - 1 symbols are
// context only.
double ngram_bits(std::span<const std::uint8_t> train, std::span<const std::uint8_t> held_out, std::int64_t vocabulary,
                  int order, double smoothing = 0.01);

}  // namespace dattn
