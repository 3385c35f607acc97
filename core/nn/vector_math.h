// Loops over features, written plainly and compiled for several instruction sets; the CPU's best is picked at load time.
// exp and tanh as polynomials, because calls into libm cannot be vectorised.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/base/dtype.h"
#include "core/base/threads.h"
#include "core/base/with_number.h"

// Put before a function whose loops are hot and whose callees are inlined. GCC only; not under ThreadSanitizer, whose
// run-time is not ready when the choice is made.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define DATTN_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DATTN_VECTORIZED
#endif
#define DATTN_INLINE [[gnu::always_inline]] inline

namespace dattn {

// Calls body(begin, end) for blocks of `block` of [0, count), spread over the rank's threads. Blocks do not depend on
// the number of threads, so sums taken within blocks do not either.
template <class Body>
void parallel_blocks(std::int64_t count, std::int64_t block, const Body& body) {
  parallel_for((count + block - 1) / block, [&](std::int64_t i) { body(i * block, std::min(count, (i + 1) * block)); });
}

DATTN_INLINE float load(const float& x) { return x; }
DATTN_INLINE float load(const BFloat16& x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
DATTN_INLINE void store(float& place, float x) { place = x; }
DATTN_INLINE void store(BFloat16& place, float x) {
  const auto word = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (word >> 16) | 0x40u;
  place.bits = static_cast<std::uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

DATTN_INLINE float load(const Float16& x) { return static_cast<float>(x); }
DATTN_INLINE void store(Float16& place, float x) { place = Float16(x); }

// Relative error below 2e-7 where the result is a normal number; 0 below -87.3. NaN stays NaN.
DATTN_INLINE float fast_exp(float x) {
  const float bounded = x > 88.3f ? 88.3f : x < -87.3f ? -87.3f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;                                         // Cephes expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<std::int32_t>(shifted) - 0x4B400000 + 127) << 23);
  return x < -87.3f ? 0.0f : p * scale;
}

DATTN_INLINE float fast_sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
DATTN_INLINE float fast_tanh(float x) { return 1.0f - 2.0f / (1.0f + fast_exp(2.0f * x)); }

// Relative error below 3e-7; 0 for 0. Not the library's, whose error number forbids vectors.
DATTN_INLINE float fast_sqrt(float x) {
  float y = std::bit_cast<float>(0x5f375a86 - (std::bit_cast<std::int32_t>(x) >> 1));  // near 1 / sqrt(x)
  for (int newton = 0; newton < 3; ++newton) y = y * (1.5f - 0.5f * x * y * y);
  return x * y;
}

}  // namespace dattn
