// A few query rows against many keys, as when a model generates: nothing is packed, every key and value is read once
// and the pass runs at the speed of memory. The result is a state that is not normalised; the driver merges the states
// of several ranges of keys ("split KV", Dao et al., Flash-Decoding, 2023).
//
// Keys, and then values, are read in the order in which they lie in memory, all heads of one before the next: a processor
// fetches ahead along such a stream better than any instruction tells it to. Loads must also leave in that order, so addresses
// are counted up in registers and never looked up: an offset read from memory halves the rate, as does a second key beside the
// first.
//
//   k  [key 0: head 0 | head 1 | ..][key 1: head 0 | ..      a block of keys, then their values, then the next block
//
// Going from keys to values breaks the stream, so blocks are large (the driver chooses them); and stores wait in the same
// queues as loads, so that the sums of values stay in registers where they fit.
#pragma once

#include <type_traits>  // as in pack.h: types alone

#include "core/attention/cpu/bands.h"
#include "core/attention/cpu/pack.h"
#include "core/attention/cpu/terms_text.h"

namespace dattn::cpu::DATTN_ISA {

// Scores of a row, in memory: those of the largest block, and some, that rows do not share a few sets of the first cache. A
// stride that the compiler does not know costs 5 %.
constexpr std::int64_t kScores = kDecodeBlock + kLanes;
constexpr std::int64_t kDropped = 128;  // keys whose dropout is drawn at once

// A query row of one head.
struct DecodeRow {
  std::int64_t row;    // of its head
  const Terms* terms;  // null: none
  RowStates state;     // at the row
  float top, sum;
  KeyRange seen;  // of the keys of a block
};

// What the loops over keys read and write, row by row, all heads together.
template <class Unit>
struct Decode {
  std::int64_t count, kv_heads, q_units, q_width, v_width;  // rows; of a row, the last two padded
  bool row_a_head;                                          // one for each KV head
  DecodeRow* rows;                                          // those of one KV head after the other
  std::int64_t* rows_of_kv;                                 // [kv_heads]
  Unit* q;                                                  // [rows][q_width]
  float* products;                                          // [rows][kLanes keys][kLanes]: q k, not summed yet
  float* p;                                                 // [rows][kScores]: scores, then probabilities
  float* out;                                               // [rows][v_width]
};

template <class Unit>
DATTN_INLINE Decode<Unit> take_decode(Arena& arena, std::int64_t dim_qk, std::int64_t dim_v, std::int64_t rows,
                                      std::int64_t kv_heads) {
  Decode<Unit> d;
  d.count = rows;
  d.kv_heads = kv_heads;
  d.q_units = units<Unit>(dim_qk);
  d.q_width = padded(d.q_units);
  d.v_width = padded(dim_v);
  d.rows = take<DecodeRow>(arena, rows);
  d.rows_of_kv = take<std::int64_t>(arena, kv_heads);
  d.q = take<Unit>(arena, rows * d.q_width);
  d.products = take<float>(arena, rows * kLanes * kLanes);
  d.p = take<float>(arena, rows * kScores);
  d.out = take<float>(arena, rows * d.v_width);
  return d;
}

template <class Unit>
std::int64_t decode_scratch(std::int64_t dim_qk, std::int64_t dim_v, std::int64_t rows, std::int64_t kv_heads) {
  Arena arena{0};
  take_decode<Unit>(arena, dim_qk, dim_v, rows, kv_heads);
  return static_cast<std::int64_t>(arena.next);
}

// The rows of a job, their states empty.
template <class Storage, class Unit>
DATTN_INLINE Decode<Unit> begin_decode(const DecodeJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  Decode<Unit> d = take_decode<Unit>(arena, job.k.dim, job.v.dim, job.n_heads * job.rows, job.kv_heads);
  const Words sign = sign_bits<Unit>(job.negate);
  for (std::int64_t kv = 0; kv < d.kv_heads; ++kv) d.rows_of_kv[kv] = 0;
  std::int64_t at = 0;
  for (std::int64_t head = 0; head < job.n_heads; ++head) {
    const DecodeHead& from = job.heads[head];
    d.rows_of_kv[from.kv] += job.rows;
    for (std::int64_t row = 0; row < job.rows; ++row, ++at) {
      const RowStates state{from.state.out + row * d.v_width, from.state.top + row, from.state.sum + row};
      d.rows[at] = {row, from.terms, state, kMinusInfinity, 0, {0, 0}};
      const auto* q = static_cast<const Storage*>(from.q.data) + row * from.q.stride;
      for (std::int64_t u = 0; u < d.q_width; u += kLanes)
        store(d.q + at * d.q_width + u, (Floats)((Words)load_units<Storage, Unit>(q, u, job.k.dim) ^ sign));
    }
  }
  d.row_a_head = true;
  for (std::int64_t kv = 0; kv < d.kv_heads; ++kv) d.row_a_head = d.row_a_head && d.rows_of_kv[kv] == 1;
  for (std::int64_t i = 0; i < d.count * d.v_width; i += kLanes) store(d.out + i, Floats{});
  return d;
}

// A row's products with one key, lane by lane; kWidth vectors of units, or, 0, as many as there are.
template <int kWidth, class Storage, class Unit>
DATTN_INLINE Floats multiply_key(const Unit* q, const Storage* key, std::int64_t q_units, std::int64_t dim) {
  constexpr std::int64_t kStep = kLanes * UnitOf<Unit>::kElements;  // elements of a vector
  Floats products{};
  if constexpr (kWidth > 0) {
#pragma GCC unroll 32
    for (int i = 0; i < kWidth; ++i)
      products = multiply_add<Unit>(load(q + i * kLanes), load_units<Storage, Unit>(key + i * kStep, 0, kStep), products);
  } else {
    for (std::int64_t u = 0; u < q_units; u += kLanes)
      products = multiply_add<Unit>(load(q + u), load_units<Storage, Unit>(key, u, dim), products);
  }
  return products;
}

// Scores of up to kLanes keys from `key` on for all rows, as columns from `column` on; those of keys past `count` are 0.
template <int kWidth, class Storage, class Unit>
DATTN_INLINE void score_keys(const Decode<Unit>& d, const DecodeJob& job, std::int64_t key, std::int64_t count,
                             std::int64_t column) {
  const std::int64_t stride = job.k.stride, head = job.k_head, dim = job.k.dim;
  const auto* keys = static_cast<const Storage*>(job.k.data) + key * stride;
  for (std::int64_t i = 0; i < smaller(count, kLanes); ++i, keys += stride) {
    const Storage* k = keys;
    const Unit* q = d.q;
    float* products = d.products + i * kLanes;
    for (std::int64_t kv = 0; kv < d.kv_heads; ++kv, k += head) {
      for (std::int64_t row = 0; row < d.rows_of_kv[kv]; ++row, q += d.q_width, products += kLanes * kLanes)
        store(products, multiply_key<kWidth>(q, k, d.q_units, dim));
    }
  }
  for (std::int64_t row = 0; row < d.count; ++row) {
    Floats products[kLanes];
    for (int i = 0; i < kLanes; ++i) products[i] = i < count ? load(d.products + (row * kLanes + i) * kLanes) : Floats{};
    store(d.p + row * kScores + column, sums_of(products));
  }
}

// Scores of the keys that a row sees of the `count` keys from `block` on become probabilities, others 0; its state follows the
// maximum.
DATTN_INLINE void softmax_row(const DecodeJob& job, const Band& band, DecodeRow& row, std::int64_t block, std::int64_t count,
                              float* p, float* out, std::int64_t v_width) {
  const Terms* terms = row.terms;
  if (terms != nullptr && terms->scores) true_scores(*terms, band, row.row, block, count, p, nullptr);
  const Ints begin = splat_int(static_cast<std::int32_t>(row.seen.begin)),
             end = splat_int(static_cast<std::int32_t>(row.seen.end));
  Floats tops = splat(kMinusInfinity);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Ints at = lane_numbers() + splat_int(static_cast<std::int32_t>(i));
    const Floats s = ((at >= begin) & (at < end)) ? load(p + i) * splat(job.scale_log2) : splat(kMinusInfinity);
    tops = at_least(tops, s);
    store(p + i, s);
  }
  const float seen = maximum_of(tops), old = row.top;
  const float top = seen > old ? seen : old;
  const float finite = top == kMinusInfinity ? 0.0f : top;
  const float rescale = top == old ? 1.0f : exp2(splat(old - finite))[0];
  Floats sum{};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Floats e = exp2(load(p + i) - splat(finite));
    sum += e;
    store(p + i, e);
  }
  if (terms != nullptr && terms->drop_below != 0) {
    unsigned char bits[keep_bytes(kDropped)];
    for (std::int64_t at = 0; at < count; at += kDropped) {
      const std::int64_t drawn = smaller(kDropped, count - at);
      keep_bits(*terms, band, row.row, 1, block + at, drawn, bits, 0);
      for (std::int64_t i = 0; i < drawn; i += kLanes)
        store(p + at + i, keep_lanes(load(p + at + i), bits, first_bit(band, block + at) + i));
    }
  }
  row.top = top;
  row.sum = row.sum * rescale + sum_of(sum);
  if (rescale == 1) return;
  for (std::int64_t c = 0; c < v_width; c += kLanes) store(out + c, load(out + c) * splat(rescale));
}

// out += p times a value.
template <int kWidth, class Storage>
DATTN_INLINE void add_value(float* out, float p, const Storage* value, std::int64_t dim) {
  const Floats factor = splat(p);
  const auto add = [&](std::int64_t c, std::int64_t end) __attribute__((always_inline)) {
    store(out + c, load(out + c) + factor * load_units<Storage, float>(value, c, end));
  };
  if constexpr (kWidth > 0) {
#pragma GCC unroll 32
    for (int c = 0; c < kWidth * kLanes; c += kLanes) add(c, c + kLanes);
  } else {
    for (std::int64_t c = 0; c < dim; c += kLanes) add(c, dim);
  }
}

// out += p v for `count` keys from `key` on, of those that each row sees: 0 times what is hidden might be NaN.
template <int kWidth, class Storage, class Unit>
DATTN_INLINE void add_values(const Decode<Unit>& d, const DecodeJob& job, std::int64_t key, std::int64_t count, bool all_seen) {
  const std::int64_t stride = job.v.stride, head = job.v_head, dim = job.v.dim;
  const auto* values = static_cast<const Storage*>(job.v.data) + key * stride;
  for (std::int64_t i = 0; i < count; ++i, values += stride) {
    const Storage* v = values;
    const DecodeRow* of = d.rows;
    const float* p = d.p + i;
    float* out = d.out;
    for (std::int64_t kv = 0; kv < d.kv_heads; ++kv, v += head) {
      for (std::int64_t row = 0; row < d.rows_of_kv[kv]; ++row, ++of, p += kScores, out += d.v_width) {
        if (all_seen || (i >= of->seen.begin && i < of->seen.end)) add_value<kWidth>(out, *p, v, dim);
      }
    }
  }
}

// Two vectors of consecutive floats as one of those at even places and one of those at odd ones, and back.
template <int... kLane>
DATTN_INLINE void take_apart(Floats& a, Floats& b, std::integer_sequence<int, kLane...>) {
  const Floats even = __builtin_shufflevector(a, b, (2 * kLane)...), odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
  a = even, b = odd;
}
template <int... kLane>
DATTN_INLINE void put_together(Floats& even, Floats& odd, std::integer_sequence<int, kLane...>) {
  const Floats a = __builtin_shufflevector(even, odd, (kLane / 2 + kLane % 2 * kLanes)...),
               b = __builtin_shufflevector(even, odd, (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...);
  even = a, odd = b;
}

// The same where every row sees all of the keys and each KV head has one row, as many of kWidth vectors as registers hold the
// sums of; false: there are more. bf16 is read a whole vector at a time, which is two of floats, of even and of odd columns.
template <int kHeads, int kWidth, class Storage, class Unit>
DATTN_INLINE bool add_values_in_registers(const Decode<Unit>& d, const DecodeJob& job, std::int64_t key, std::int64_t count) {
  if (d.count != kHeads) {
    if constexpr ((kHeads + 1) * kWidth <= kBlock * kVectors)
      return add_values_in_registers<kHeads + 1, kWidth, Storage>(d, job, key, count);
    return false;
  }
  constexpr std::make_integer_sequence<int, kLanes> kEveryLane;
  constexpr bool kPairs = std::is_same_v<Storage, Half>;
  const std::int64_t stride = job.v.stride, head = job.v_head;
  const auto* values = static_cast<const Storage*>(job.v.data) + key * stride;
  Floats sums[kHeads * kWidth];
#pragma GCC unroll 32
  for (int i = 0; i < kHeads * kWidth; ++i) sums[i] = load(d.out + i * kLanes);
  if constexpr (kPairs) {
#pragma GCC unroll 32
    for (int i = 0; i < kHeads * kWidth; i += 2) take_apart(sums[i], sums[i + 1], kEveryLane);
  }
  for (std::int64_t i = 0; i < count; ++i, values += stride) {
    const Storage* v = values;
#pragma GCC unroll 32
    for (int h = 0; h < kHeads; ++h, v += head) {
      const Floats p = splat(d.p[h * kScores + i]);
#pragma GCC unroll 32
      for (int c = 0; c < kWidth; c += kPairs ? 2 : 1) {
        if constexpr (kPairs) {
          const Words both = (Words)load(v + c * kLanes);
          sums[h * kWidth + c] += p * (Floats)(both << 16);
          sums[h * kWidth + c + 1] += p * (Floats)(both & (0xffff0000u - Words{}));
        } else {
          sums[h * kWidth + c] += p * load_units<Storage, float>(v, c * kLanes, kWidth * kLanes);
        }
      }
    }
  }
  if constexpr (kPairs) {
#pragma GCC unroll 32
    for (int i = 0; i < kHeads * kWidth; i += 2) put_together(sums[i], sums[i + 1], kEveryLane);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kHeads * kWidth; ++i) store(d.out + i * kLanes, sums[i]);
  return true;
}

// Calls body(integral constant width): vectors of units of a head, known to the loops for the common dims, else 0.
template <class Unit, class Body>
DATTN_INLINE void with_width(std::int64_t dim, const Body& body) {
  constexpr int kOf64 = 64 / kLanes / UnitOf<Unit>::kElements;
  if (dim == 64) {
    body(Width<kOf64>{});
  } else if (dim == 128) {
    body(Width<2 * kOf64>{});
  } else {
    body(Width<0>{});
  }
}

template <class Storage, class Unit>
void decode(const DecodeJob& job) {
  const Decode<Unit> d = begin_decode<Storage, Unit>(job);
  for (std::int64_t b = 0; b < job.n_bands; ++b) {
    const Band& band = job.bands[b];
    for (std::int64_t block = band.k_begin; block < band.k_end; block += job.block) {
      const std::int64_t count = smaller(job.block, band.k_end - block);
      bool all_seen = true;
      for (std::int64_t row = 0; row < d.count; ++row) {
        const KeyRange seen = keys_of_row(band, d.rows[row].row);
        d.rows[row].seen = {larger(seen.begin - block, 0), smaller(seen.end - block, count)};
        all_seen = all_seen && seen.begin <= block && seen.end >= block + count;
      }
      for (std::int64_t i = 0; i < count; i += kLanes) {
        with_width<Unit>(
            job.k.dim, [&](auto width) __attribute__((always_inline)) {
              score_keys<decltype(width)::value, Storage>(d, job, block + i, count - i, i);
            });
      }
      for (std::int64_t row = 0; row < d.count; ++row) {
        if (d.rows[row].seen.begin < d.rows[row].seen.end)
          softmax_row(job, band, d.rows[row], block, count, d.p + row * kScores, d.out + row * d.v_width, d.v_width);
      }
      with_width<float>(
          job.v.dim, [&](auto width) __attribute__((always_inline)) {
            constexpr int kWidth = decltype(width)::value;
            if constexpr (kWidth > 0 && kWidth <= kBlock * kVectors) {
              if (all_seen && d.row_a_head && add_values_in_registers<1, kWidth, Storage>(d, job, block, count)) return;
            }
            add_values<kWidth, Storage>(d, job, block, count, all_seen);
          });
    }
  }
  for (std::int64_t row = 0; row < d.count; ++row) {
    const DecodeRow& from = d.rows[row];
    *from.state.top = from.top;
    *from.state.sum = from.sum;
    for (std::int64_t c = 0; c < d.v_width; c += kLanes) store(from.state.out + c, load(d.out + row * d.v_width + c));
  }
}

}  // namespace dattn::cpu::DATTN_ISA
