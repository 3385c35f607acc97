// A vector of floats for the instruction set this file is compiled for: the only place that knows one. Everything is
// static and inside a namespace named after the instruction set (DATTN_ISA), see ops.h for why.
// exp2: Cody-Waite reduction to [-1/2, 1/2] and a minimax polynomial, of degree 6 (relative error 2e-9 before rounding), or 4
// (2.6e-6) where the result becomes bf16.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own AVX-512 header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DATTN_INLINE static inline __attribute__((always_inline))

namespace dattn::cpu::DATTN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;  // vectors of one register block row: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;  // 6 x 2 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4;  // NEON has 32 registers, too
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kPanel = kLanes * kVectors;
constexpr float kMinusInfinity = -__builtin_inff(), kFarBelow = -1e30f;

using Floats __attribute__((vector_size(kLanes * 4))) = float;
using Ints __attribute__((vector_size(kLanes * 4))) = std::int32_t;
using Words __attribute__((vector_size(kLanes * 4))) = std::uint32_t;
using Longs __attribute__((vector_size(kLanes * 4))) = std::uint64_t;  // kLanes / 2 of them
using Halves __attribute__((vector_size(kLanes * 2))) = std::uint16_t;
using FloatsAnywhere __attribute__((vector_size(kLanes * 4), aligned(2), may_alias)) = float;
using HalvesAnywhere __attribute__((vector_size(kLanes * 2), aligned(2), may_alias)) = std::uint16_t;
using HalfAlias __attribute__((may_alias)) = std::uint16_t;

// Storage and unit types. A Pair is two bf16, the lower half first along the summed axis.
struct Half {  // bf16
  static constexpr bool kBrain = true;
  std::uint16_t bits;
};
struct Binary16 {  // fp16
  static constexpr bool kBrain = false;
  std::uint16_t bits;
};
struct Pair {
  std::uint32_t bits;
};

DATTN_INLINE Floats splat(float value) { return value - Floats{}; }
DATTN_INLINE Ints splat_int(std::int32_t value) { return value - Ints{}; }
DATTN_INLINE Floats load(const void* from) { return *static_cast<const FloatsAnywhere*>(from); }
DATTN_INLINE void store(void* to, Floats value) { *static_cast<FloatsAnywhere*>(to) = value; }

template <class Storage>
DATTN_INLINE Floats widen(Halves half) {
#if defined(__AVX512F__)
  if constexpr (Storage::kBrain) return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
  return _mm512_cvtph_ps((__m256i)half);
#else
  const Words bits = __builtin_convertvector(half, Words);
  if constexpr (Storage::kBrain) return (Floats)(bits << 16);
  const Words size = bits & (0x7fffu - Words{});
  const Words normal = (size << 13) + ((112u << 23) - Words{}), special = (size << 13) | (0x7f800000u - Words{});
  const Words subnormal = (Words)(__builtin_convertvector((Ints)size, Floats) * splat(0x1p-24f));
  const Words finite = (Ints)size < splat_int(0x400) ? subnormal : normal;
  return (Floats)(((bits >> 15) << 31) | ((Ints)size < splat_int(0x7c00) ? finite : special));
#endif
}
template <class Storage>
DATTN_INLINE Floats load_half(const void* from) {
  return widen<Storage>(*static_cast<const HalvesAnywhere*>(from));
}

// The first `bytes` bytes (fewer than a vector), the rest 0.
DATTN_INLINE Floats load_part(const void* from, std::int64_t bytes) {
  if (bytes <= 0) return Floats{};
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, from);
#endif
  alignas(64) unsigned char part[sizeof(Floats)] = {};
  for (std::int64_t i = 0; i < bytes; ++i) part[i] = static_cast<const unsigned char*>(from)[i];
  return load(part);
}

DATTN_INLINE Halves load_part_half(const void* from, std::int64_t count) {
  Halves part{};
  for (std::int64_t i = 0; i < count; ++i) part[i] = static_cast<const HalfAlias*>(from)[i];
  return part;
}

// NaN in `value` comes out; the x86 instructions return their second operand then.
DATTN_INLINE Floats at_least(Floats low, Floats value) {
#if defined(__AVX512F__)
  return _mm512_max_ps(low, value);
#elif defined(__AVX2__)
  return _mm256_max_ps(low, value);
#elif defined(__SSE2__)
  return _mm_max_ps(low, value);
#elif defined(__aarch64__)
  return vmaxq_f32(low, value);
#else
  return low > value ? low : value;
#endif
}

// a * b + c, rounded once on every path that can: compilers choose for themselves, here and there differently.
DATTN_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

template <int kDegree>
DATTN_INLINE Floats polynomial(Floats f) {
  if constexpr (kDegree == 4) {
    Floats p = splat(9.570101911e-03f);
    p = p * f + splat(5.591786032e-02f);
    p = p * f + splat(2.402474483e-01f);
    p = p * f + splat(6.931218147e-01f);
    return p * f + splat(9.999992614e-01f);
  }
  static_assert(kDegree == 4 || kDegree == 6);
  Floats p = splat(1.535336199e-04f);
  p = p * f + splat(1.339887457e-03f);
  p = p * f + splat(9.618437359e-03f);
  p = p * f + splat(5.550332471e-02f);
  p = p * f + splat(2.402264791e-01f);
  p = p * f + splat(6.931472029e-01f);
  return p * f + splat(1.0f);
}

// 2^x; 0 below -126 (-inf too, unless kFinite says that it does not come: then NaN), large but finite or inf above 127; NaN
// stays NaN.
template <int kDegree = 6, bool kFinite = false>
DATTN_INLINE Floats exp2(Floats x) {
#if defined(__AVX512F__)
  if constexpr (!kFinite) x = _mm512_max_ps(splat(-300.0f), x);
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial<kDegree>(x - n), n);
#else
  const Floats low = splat(-126.0f), high = splat(127.0f),
               magic = splat(12582912.0f);  // 1.5 * 2^23: rounds, keeps n in low bits
  const Ints tiny = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats shifted = x + magic;
  const Floats p = polynomial<kDegree>(x - (shifted - magic));
  const Floats y = (Floats)((Ints)p + ((Ints)shifted << 23));
  return tiny ? Floats{} : (x == x ? y : x);
#endif
}

DATTN_INLINE float sum_of(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value);
#else
  float sum[kLanes];
  store(sum, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
#endif
}

DATTN_INLINE float maximum_of(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(value);
#else
  float top[kLanes];
  store(top, value);
  for (int i = 1; i < kLanes; ++i) top[0] = top[i] > top[0] ? top[i] : top[0];
  return top[0];
#endif
}

DATTN_INLINE Ints lane_numbers() {
#if defined(__AVX512F__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return Ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return Ints{0, 1, 2, 3};
#endif
}

DATTN_INLINE Longs splat_long(std::uint64_t value) { return value - Longs{}; }

// Products of the lower halves of each element.
DATTN_INLINE Longs multiply_low(Longs a, Longs b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (Longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & splat_long(0xffffffffu)) * (b & splat_long(0xffffffffu));
#endif
}

// Bit i: whether lane i of a comparison's result is true.
DATTN_INLINE std::uint32_t bits_of(Ints truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)truth));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps((__m128)truth));
#elif defined(__aarch64__)
  return vaddvq_u32((uint32x4_t)(truth & Ints{1, 2, 4, 8}));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= truth[i] != 0 ? 1u << i : 0u;
  return bits;
#endif
}

// `value` in the lanes whose bit is set, else 0.
DATTN_INLINE Floats where_set(std::uint32_t bits, Floats value) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), value);
#else
  const Ints set = splat_int(static_cast<std::int32_t>(bits)) & (splat_int(1) << lane_numbers());
  return (Floats)((Ints)value & (Ints)(set != Ints{}));
#endif
}

// Units: broadcast, multiply-add, and how many elements one holds.
template <class Unit>
struct UnitOf;
template <>
struct UnitOf<float> {
  static constexpr int kElements = 1, kDegree = 6;  // kDegree: of exp2, for probabilities
};
template <>
struct UnitOf<Pair> {
  static constexpr int kElements = 2, kDegree = 4;
};

DATTN_INLINE Floats broadcast(const float* from) { return splat(*from); }
DATTN_INLINE Floats broadcast(const Pair* from) { return (Floats)splat_int(static_cast<std::int32_t>(from->bits)); }

template <class Unit>
DATTN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512BF16__)
  if constexpr (UnitOf<Unit>::kElements == 2) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return a * b + c;
}

#if defined(__AVX512BF16__)
// 32 floats, first `low`, as 16 pairs of neighbours.
DATTN_INLINE Floats to_pairs(Floats low, Floats high) { return (Floats)_mm512_cvtne2ps_pbh(high, low); }

// Lane i: the pair (even[i], odd[i]).
DATTN_INLINE Floats interleave_pairs(Floats even, Floats odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Floats)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
#endif

}  // namespace dattn::cpu::DATTN_ISA
