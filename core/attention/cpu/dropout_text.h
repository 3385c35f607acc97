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

// The four words of each counter, of kMany vectors of counters for each of kRows rows at once: a round waits for the
// multiplications of the one before, and what the other vectors need fills the time.
template <int kRows, int kMany>
DATTN_INLINE void philox(const Terms& t, const PhiloxRow (&rows)[kRows], const Longs (&counters)[kMany],
                         Longs (&words)[kRows * kMany][4]) {
  const Longs factor_a = splat_long(kPhiloxA), factor_b = splat_long(kPhiloxB);
#pragma GCC unroll 4
  for (int i = 0; i < kRows * kMany; ++i) {
    const PhiloxRow& row = rows[i / kMany];
    const Longs b1 = multiply_low(factor_b, counters[i % kMany] ^ splat_long(row.first));
    const Longs a2 = multiply_low(factor_a, (b1 >> 32) ^ splat_long(row.second));
    words[i][0] = b1 ^ splat_long(row.third_a);
    words[i][1] = splat_long(row.word);
    words[i][2] = (a2 >> 32) ^ splat_long(row.third_b);
    words[i][3] = a2;
  }
  std::uint32_t key0 = t.key[0] + 3 * kPhiloxKeyA, key1 = t.key[1] + 3 * kPhiloxKeyB;
#pragma GCC unroll 7
  for (int round = 3; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows * kMany; ++i) {
      const Longs a = multiply_low(factor_a, words[i][0]), b = multiply_low(factor_b, words[i][2]);
      words[i][0] = (b >> 32) ^ words[i][1] ^ splat_long(key0);
      words[i][2] = (a >> 32) ^ words[i][3] ^ splat_long(key1);
      words[i][1] = b;
      words[i][3] = a;
    }
    key0 += kPhiloxKeyA;
    key1 += kPhiloxKeyB;
  }
}

// Lower halves of `even` and `odd` side by side.
DATTN_INLINE Longs side_by_side(Longs even, Longs odd) { return (even & splat_long(0xffffffffu)) | (odd << 32); }

DATTN_INLINE Longs long_numbers() { return ((Longs)lane_numbers() & splat_long(0xffffffffu)) >> 1; }  // 0, 1, ..

// Half the elements of two vectors in turn: a[first], b[first], a[first + 1], ..
template <int kFirst, int... kLane>
DATTN_INLINE Longs in_turn(Longs a, Longs b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * (kLanes / 2))...);
}

// Words of kLanes / 2 keys at key, key + step, ..: each has a counter of its own.
DATTN_INLINE Longs words_apart(const Terms& t, const PhiloxRow (&row)[1], std::int64_t key, std::int64_t step) {
  const Longs position =
      splat_long(static_cast<std::uint64_t>(key)) + multiply_low(long_numbers(), splat_long(static_cast<std::uint64_t>(step)));
  const Longs counters[1] = {position >> 2};
  Longs w[1][4];
  philox(t, row, counters, w);
  const Longs word = position & splat_long(3);
  return word < splat_long(2) ? (word == splat_long(0) ? w[0][0] : w[0][1]) : (word == splat_long(2) ? w[0][2] : w[0][3]);
}

// One bit a key for two vectors of words.
DATTN_INLINE void store_kept(const Terms& t, Words low, Words high, unsigned char* bits) {
  const Ints least = splat_int(static_cast<std::int32_t>(t.drop_below));
  const std::uint32_t both = bits_of((Ints)(low >> 8) >= least) | bits_of((Ints)(high >> 8) >= least) << kLanes;
  __builtin_memcpy(bits, &both, kLanes / 4);
}

// The bits of 2 kMany kLanes neighbouring keys from position `key` on, a multiple of 4; those of the rows lie `stride` bytes
// apart.
template <int kMany, int kRows>
DATTN_INLINE void keep_neighbours(const Terms& t, const PhiloxRow (&rows)[kRows], std::int64_t key, unsigned char* bits,
                                  std::int64_t stride) {
  constexpr std::make_integer_sequence<int, kLanes / 2> kEveryLane;
  Longs counters[kMany], w[kRows * kMany][4];
#pragma GCC unroll 2
  for (int i = 0; i < kMany; ++i)
    counters[i] =
        splat_long((static_cast<std::uint64_t>(key) >> 2) + static_cast<std::uint64_t>(i * kLanes / 2)) + long_numbers();
  philox(t, rows, counters, w);
#pragma GCC unroll 4
  for (int i = 0; i < kRows * kMany; ++i) {
    const Longs first = side_by_side(w[i][0], w[i][1]), second = side_by_side(w[i][2], w[i][3]);
    store_kept(t, (Words)in_turn<0>(first, second, kEveryLane), (Words)in_turn<kLanes / 4>(first, second, kEveryLane),
               bits + i / kMany * stride + i % kMany * kLanes / 4);
  }
}

// Bytes that keep_bits fills for `count` keys, and what reading past them touches.
constexpr std::int64_t keep_bytes(std::int64_t count) { return (count + 3 + 2 * kLanes) / 8 + 8; }

// Where keep_bits puts the bit of its first key; the same for all rows of a band.
DATTN_INLINE std::int64_t first_bit(const Band& band, std::int64_t key) {
  return band.k_step == 1 ? (band.k_position + key - band.k_begin) & 3 : 0;
}

// One bit a key, set where it is kept: `count` keys from `key` on, for kRows rows, whose bits lie `stride` bytes apart.
template <int kRows>
DATTN_INLINE void keep_rows(const Terms& t, const Band& band, std::int64_t row, std::int64_t key, std::int64_t count,
                            unsigned char* bits, std::int64_t stride) {
  constexpr std::int64_t kKeys = 2 * kLanes;
  const std::int64_t position = band.k_position + (key - band.k_begin) * band.k_step, first = first_bit(band, key);
  PhiloxRow from[kRows];
  for (int r = 0; r < kRows; ++r) from[r] = philox_row(t, band.q_position + (row + r - band.row_begin) * band.q_step);
  std::int64_t i = 0;
  for (; i + kKeys < first + count; i += 2 * kKeys) keep_neighbours<2>(t, from, position - first + i, bits + i / 8, stride);
  if (i < first + count) keep_neighbours<1>(t, from, position - first + i, bits + i / 8, stride);
}

// The same for one row where keys lie apart.
DATTN_INLINE void keep_row_apart(const Terms& t, const Band& band, std::int64_t row, std::int64_t key, std::int64_t count,
                                 unsigned char* bits) {
  const PhiloxRow from[1] = {philox_row(t, band.q_position + (row - band.row_begin) * band.q_step)};
  const std::int64_t position = band.k_position + (key - band.k_begin) * band.k_step, step = band.k_step;
  for (std::int64_t i = 0; i < count; i += 2 * kLanes) {
    Words words[2];
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = position + (i + half * kLanes) * step;
      words[half] = (Words)side_by_side(words_apart(t, from, at, 2 * step), words_apart(t, from, at + step, 2 * step));
    }
    store_kept(t, words[0], words[1], bits + i / 8);
  }
}

// The same for any number of rows. Rows and columns outside the band get any bits.
static __attribute__((noinline)) void keep_bits(const Terms& terms, const Band& band, std::int64_t row, std::int64_t rows,
                                                std::int64_t key, std::int64_t count, unsigned char* bits,
                                                std::int64_t stride) {
  const Terms t = terms;  // where no store to `bits` can reach it: its keys stay in registers
  std::int64_t r = 0;
  if (band.k_step == 1) {
    for (; r + 1 < rows; r += 2) keep_rows<2>(t, band, row + r, key, count, bits + r * stride, stride);
    if (r < rows) keep_rows<1>(t, band, row + r, key, count, bits + r * stride, stride);
    return;
  }
  for (; r < rows; ++r) keep_row_apart(t, band, row + r, key, count, bits + r * stride);
}

// The lanes of `value` whose bits, from number `bit` on, are set; else 0.
DATTN_INLINE Floats keep_lanes(Floats value, const unsigned char* bits, std::int64_t bit) {
  std::uint32_t word;
  __builtin_memcpy(&word, bits + (bit >> 3), 4);
  return where_set(word >> (bit & 7), value);
}

}  // namespace dattn::cpu::DATTN_ISA
