// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): a counter-based generator.
// A random number is a pure function of (key, counter), so the same element gets the same number on any mesh.
#pragma once

#include <array>
#include <cstdint>

namespace dattn {

using PhiloxBlock = std::array<std::uint32_t, 4>;

constexpr PhiloxBlock philox4x32(std::uint64_t key, PhiloxBlock counter) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
               static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 24 bits.
constexpr float uniform01(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// Uniform in [0, 1), one number per (key, stream, index): what initial weights, data order and sampling use.
constexpr float philox_uniform(std::uint64_t key, std::uint64_t stream, std::uint64_t index) {
  const PhiloxBlock block = philox4x32(key, {static_cast<std::uint32_t>(index >> 2), static_cast<std::uint32_t>(index >> 34),
                                             static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)});
  return uniform01(block[index & 3]);
}

// Standard normal by Box-Muller, one number per (key, stream, index).
float philox_normal(std::uint64_t key, std::uint64_t stream, std::uint64_t index);

}  // namespace dattn
