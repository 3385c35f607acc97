// Dropout's random bits, a row of a tile at a time: the numbers of core/attention/dropout.h, computed for kLanes / 2
// counters at once. Philox multiplies 32 by 32 bits, so a counter's words lie in the lower halves of 64-bit lanes; what
// stands in the upper halves is never read.
#pragma once

#include "core/attention/cpu/bands.h"

namespace dattn::cpu::DATTN_ISA {

constexpr std::uint64_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxKeyA = 0x9E3779B9u, kPhiloxKeyB = 0xBB67AE85u;

// Only the last word of the counter differs along a row: what rounds 0 to 2 make of the others, once a row.
struct PhiloxRow {
  std::uint64_t first, second, third_a, third_b, word;
};

DATTN_INLINE PhiloxRow philox_row(const Terms& t, std::int64_t query) {
  const std::uint64_t a = kPhiloxA * t.stream, b = kPhiloxB * static_cast<std::uint32_t>(query);
  const std::uint32_t word0 = static_cast<std::uint32_t>(b >> 32) ^ t.row ^ t.key[0];
  const std::uint64_t a1 = kPhiloxA * word0;
  const std::uint32_t word2 = static_cast<std::uint32_t>(a1 >> 32) ^ static_cast<std::uint32_t>(a) ^ (t.key[1] + kPhiloxKeyB);
  const std::uint64_t b2 = kPhiloxB * word2;
  return {(a >> 32) ^ t.key[1], static_cast<std::uint32_t>(b) ^ (t.key[0] + kPhiloxKeyA),
          (b2 >> 32) ^ (t.key[0] + 2 * kPhiloxKeyA), static_cast<std::uint32_t>(a1) ^ (t.key[1] + 2 * kPhiloxKeyB), b2};
}

// The four words of each counter.
DATTN_INLINE void philox(const Terms& t, const PhiloxRow& row, Longs counter, Longs (&words)[4]) {
  const Longs factor_a = splat_long(kPhiloxA), factor_b = splat_long(kPhiloxB);
  const Longs b1 = multiply_low(factor_b, counter ^ splat_long(row.first));
  const Longs a2 = multiply_low(factor_a, (b1 >> 32) ^ splat_long(row.second));
  Longs word0 = b1 ^ splat_long(row.third_a), word1 = splat_long(row.word), word2 = (a2 >> 32) ^ splat_long(row.third_b),
        word3 = a2;
  std::uint32_t key0 = t.key[0] + 3 * kPhiloxKeyA, key1 = t.key[1] + 3 * kPhiloxKeyB;
#pragma GCC unroll 7
  for (int round = 3; round < 10; ++round) {
    const Longs a = multiply_low(factor_a, word0), b = multiply_low(factor_b, word2);
    word0 = (b >> 32) ^ word1 ^ splat_long(key0);
    word2 = (a >> 32) ^ word3 ^ splat_long(key1);
    word1 = b;
    word3 = a;
    key0 += kPhiloxKeyA;
    key1 += kPhiloxKeyB;
  }
  words[0] = word0;
  words[1] = word1;
  words[2] = word2;
  words[3] = word3;
}

// Lower halves of `even` and `odd` side by side.
DATTN_INLINE Longs side_by_side(Longs even, Longs odd) { return (even & splat_long(0xffffffffu)) | (odd << 32); }

DATTN_INLINE Longs long_numbers() { return ((Longs)lane_numbers() & splat_long(0xffffffffu)) >> 1; }  // 0, 1, ..

// Half the elements of two vectors in turn: a[first], b[first], a[first + 1], ..
template <int kFirst, int... kLane>
DATTN_INLINE Longs in_turn(Longs a, Longs b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * (kLanes / 2))...);
}

// Words of 2 kLanes neighbouring keys from position `key` on, a multiple of 4.
DATTN_INLINE void words_of_neighbours(const Terms& t, const PhiloxRow& row, std::int64_t key, Words (&words)[2]) {
  constexpr std::make_integer_sequence<int, kLanes / 2> kEveryLane;
  Longs w[4];
  philox(t, row, splat_long(static_cast<std::uint64_t>(key) >> 2) + long_numbers(), w);
  const Longs first = side_by_side(w[0], w[1]), second = side_by_side(w[2], w[3]);
  words[0] = (Words)in_turn<0>(first, second, kEveryLane);
  words[1] = (Words)in_turn<kLanes / 4>(first, second, kEveryLane);
}

// Words of kLanes / 2 keys at key, key + step, ..: each has a counter of its own.
DATTN_INLINE Longs words_apart(const Terms& t, const PhiloxRow& row, std::int64_t key, std::int64_t step) {
  const Longs position =
      splat_long(static_cast<std::uint64_t>(key)) + multiply_low(long_numbers(), splat_long(static_cast<std::uint64_t>(step)));
  Longs w[4];
  philox(t, row, position >> 2, w);
  const Longs word = position & splat_long(3);
  return word < splat_long(2) ? (word == splat_long(0) ? w[0] : w[1]) : (word == splat_long(2) ? w[2] : w[3]);
}

DATTN_INLINE std::uint32_t kept_bits(const Terms& t, Words words) {
  return bits_of((Ints)(words >> 8) >= splat_int(static_cast<std::int32_t>(t.drop_below)));
}

// Bytes that keep_bits fills for `count` keys, and what reading past them touches.
constexpr std::int64_t keep_bytes(std::int64_t count) { return (count + 3 + 2 * kLanes) / 8 + 8; }

// Where keep_bits puts the bit of its first key; the same for all rows of a band.
DATTN_INLINE std::int64_t first_bit(const Band& band, std::int64_t key) {
  return band.k_step == 1 ? (band.k_position + key - band.k_begin) & 3 : 0;
}

// One bit a key, set where it is kept: `count` keys from `key` on, for one row. Columns outside the band get any bits.
static __attribute__((noinline)) void keep_bits(const Terms& t, const Band& band, std::int64_t row, std::int64_t key,
                                                std::int64_t count, unsigned char* bits) {
  const PhiloxRow from = philox_row(t, band.q_position + (row - band.row_begin) * band.q_step);
  const std::int64_t position = band.k_position + (key - band.k_begin) * band.k_step, first = first_bit(band, key);
  for (std::int64_t i = 0; i < first + count; i += 2 * kLanes, bits += kLanes / 4) {
    Words words[2];
    if (band.k_step == 1) {
      words_of_neighbours(t, from, position - first + i, words);
    } else {
      for (int half = 0; half < 2; ++half) {
        const std::int64_t at = position + (i + half * kLanes) * band.k_step;
        words[half] = (Words)side_by_side(words_apart(t, from, at, 2 * band.k_step),
                                          words_apart(t, from, at + band.k_step, 2 * band.k_step));
      }
    }
    const std::uint32_t both = kept_bits(t, words[0]) | kept_bits(t, words[1]) << kLanes;
    __builtin_memcpy(bits, &both, kLanes / 4);
  }
}

// The lanes of `value` whose bits, from number `bit` on, are set; else 0.
DATTN_INLINE Floats keep_lanes(Floats value, const unsigned char* bits, std::int64_t bit) {
  std::uint32_t word;
  __builtin_memcpy(&word, bits + (bit >> 3), 4);
  return where_set(word >> (bit & 7), value);
}

}  // namespace dattn::cpu::DATTN_ISA
