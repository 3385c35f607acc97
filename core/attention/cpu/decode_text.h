// A few query rows against many keys, as when a model generates: nothing is packed, every key and value is read once
// and the pass runs at the speed of memory. The result is a state that is not normalised; the driver merges the states
// of several ranges of keys ("split KV", Dao et al., Flash-Decoding, 2023).
//
// Keys, and then values, are read in the order in which they lie in memory, all heads of one before the next, and nothing else
// is read from there: a processor fetches ahead along such a stream better than any instruction tells it to.
//
//   k  [key 0: head 0 | head 1 | ..][key 1: head 0 | ..      64 keys, then their values, then the next 64
#pragma once

#include "core/attention/cpu/bands.h"
#include "core/attention/cpu/pack.h"
#include "core/attention/cpu/terms_text.h"

namespace dattn::cpu::DATTN_ISA {

constexpr std::int64_t kDecodeBlock = 64;  // keys between two updates of the maximum; a multiple of kLanes

// Of each query row of each head.
struct Decode {
  std::int64_t q_width, v_width;  // D and V, padded
  float* q;                       // [heads][rows][q_width]
  float* products;                // [heads][rows][kLanes keys][kLanes]: q k, not summed yet
  float* p;                       // [heads][rows][kDecodeBlock]: scores, then probabilities
};

DATTN_INLINE Decode take_decode(Arena& arena, std::int64_t dim_qk, std::int64_t dim_v, std::int64_t rows) {
  Decode d;
  d.q_width = padded(dim_qk);
  d.v_width = padded(dim_v);
  d.q = take<float>(arena, rows * d.q_width);
  d.products = take<float>(arena, rows * kLanes * kLanes);
  d.p = take<float>(arena, rows * kDecodeBlock);
  return d;
}

static std::int64_t decode_scratch(std::int64_t dim_qk, std::int64_t rows) {
  Arena arena{0};
  take_decode(arena, dim_qk, 0, rows);
  return static_cast<std::int64_t>(arena.next);
}

// Calls body(query row, its number among those of all heads) for the rows of one head.
template <class Body>
DATTN_INLINE void for_each_row(const DecodeJob& job, std::int64_t head, const Body& body) {
  for (std::int64_t row = 0; row < job.rows; ++row) body(row, head * job.rows + row);
}

// Calls body(c, elements [c, c + kLanes)) for all elements of a key or value; 0 past the end.
template <class Storage, class Body>
DATTN_INLINE void for_each_vector(const Storage* from, std::int64_t dim, const Body& body) {
  std::int64_t c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4 * kLanes; i += kLanes) body(c + i, load_units<Storage, float>(from, c + i, c + i + kLanes));
  }
  for (; c < dim; c += kLanes) body(c, load_units<Storage, float>(from, c, dim));
}

// Scores of up to kLanes keys from `key` on for all rows; those of keys past `count` are 0.
template <class Storage>
DATTN_INLINE void score_keys(const Decode& d, const DecodeJob& job, std::int64_t key, std::int64_t count, std::int64_t column) {
  const auto* keys = static_cast<const Storage*>(job.k.data) + key * job.k.stride;
  for (std::int64_t i = 0; i < smaller(count, kLanes); ++i, keys += job.k.stride) {
    for (std::int64_t head = 0; head < job.n_heads; ++head) {
      const Storage* from = keys + job.heads[head].kv * job.k_head;
      for_each_row(
          job, head, [&](std::int64_t, std::int64_t n) __attribute__((always_inline)) {
            Floats products{};
            const float* q = d.q + n * d.q_width;
            for_each_vector(
                from, job.k.dim, [&](std::int64_t c, Floats k) __attribute__((always_inline)) { products += load(q + c) * k; });
            store(d.products + (n * kLanes + i) * kLanes, products);
          });
    }
  }
  for (std::int64_t n = 0; n < job.n_heads * job.rows; ++n) {
    Floats products[kLanes];
    for (int i = 0; i < kLanes; ++i) products[i] = i < count ? load(d.products + (n * kLanes + i) * kLanes) : Floats{};
    store(d.p + n * kDecodeBlock + column, sums_of(products));
  }
}

// Scores of the keys [begin, begin + count) of a block that starts with key `block` become probabilities of one row, others 0;
// out, top and sum follow the maximum.
DATTN_INLINE void softmax_row(const Decode& d, const DecodeJob& job, const Band& band, std::int64_t head, std::int64_t row,
                              std::int64_t block, KeyRange range) {
  const Terms* terms = job.heads[head].terms;
  const RowStates& state = job.heads[head].state;
  float* p = d.p + (head * job.rows + row) * kDecodeBlock;
  if (terms != nullptr && terms->scores) true_scores(*terms, band, row, block, kDecodeBlock, p, nullptr);
  const Ints begin = splat_int(static_cast<std::int32_t>(range.begin - block)),
             end = splat_int(static_cast<std::int32_t>(range.end - block));
  Floats tops = splat(kMinusInfinity);
  for (int i = 0; i < kDecodeBlock; i += kLanes) {
    const Ints at = lane_numbers() + splat_int(i);
    const Floats s = ((at >= begin) & (at < end)) ? load(p + i) * splat(job.scale_log2) : splat(kMinusInfinity);
    tops = at_least(tops, s);
    store(p + i, s);
  }
  const float seen = maximum_of(tops), old = state.top[row];
  const float top = seen > old ? seen : old;
  const float finite = top == kMinusInfinity ? 0.0f : top;
  const float rescale = top == old ? 1.0f : exp2(splat(old - finite))[0];
  Floats sum{};
  for (std::int64_t i = 0; i < kDecodeBlock; i += kLanes) {
    const Floats e = exp2(load(p + i) - splat(finite));
    sum += e;
    store(p + i, e);
  }
  if (terms != nullptr && terms->drop_below != 0) {
    unsigned char bits[keep_bytes(kDecodeBlock)];
    keep_bits(*terms, band, row, 1, block, kDecodeBlock, bits, 0);
    for (std::int64_t i = 0; i < kDecodeBlock; i += kLanes)
      store(p + i, keep_lanes(load(p + i), bits, first_bit(band, block) + i));
  }
  state.top[row] = top;
  state.sum[row] = state.sum[row] * rescale + sum_of(sum);
  if (rescale == 1) return;
  float* out = state.out + row * d.v_width;
  for (std::int64_t c = 0; c < d.v_width; c += kLanes) store(out + c, load(out + c) * splat(rescale));
}

// out += p v for the keys [block, block + count), of which each row sees ranges[row].
template <class Storage>
DATTN_INLINE void add_values(const Decode& d, const DecodeJob& job, std::int64_t block, std::int64_t count,
                             const KeyRange (&ranges)[kDecodeRows]) {
  const auto* values = static_cast<const Storage*>(job.v.data) + block * job.v.stride;
  for (std::int64_t i = 0; i < count; ++i, values += job.v.stride) {
    for (std::int64_t head = 0; head < job.n_heads; ++head) {
      const Storage* from = values + job.heads[head].kv * job.v_head;
      for_each_row(
          job, head, [&](std::int64_t row, std::int64_t n) __attribute__((always_inline)) {
            if (!overlaps(ranges[row], block + i, block + i + 1)) return;  // 0 times what is hidden might be NaN
            float* out = job.heads[head].state.out + row * d.v_width;
            const Floats p = splat(d.p[n * kDecodeBlock + i]);
            for_each_vector(
                from, job.v.dim, [&](std::int64_t c, Floats v) __attribute__((always_inline)) {
                  store(out + c, load(out + c) + p * v);
                });
          });
    }
  }
}

// All rows against the keys [block, block + count) of a band, count <= kDecodeBlock.
template <class Storage>
DATTN_INLINE void decode_block(const Decode& d, const DecodeJob& job, const Band& band, std::int64_t block,
                               std::int64_t count) {
  KeyRange ranges[kDecodeRows];
  for (std::int64_t row = 0; row < job.rows; ++row) {
    const KeyRange seen = keys_of_row(band, row);
    ranges[row] = {larger(seen.begin, block), smaller(seen.end, block + count)};
  }
  for (std::int64_t i = 0; i < count; i += kLanes) score_keys<Storage>(d, job, block + i, count - i, i);
  for (std::int64_t head = 0; head < job.n_heads; ++head) {
    for (std::int64_t row = 0; row < job.rows; ++row) {
      if (ranges[row].begin < ranges[row].end) softmax_row(d, job, band, head, row, block, ranges[row]);
    }
  }
  add_values<Storage>(d, job, block, count, ranges);
}

template <class Storage>
void decode(const DecodeJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  const Decode d = take_decode(arena, job.k.dim, job.v.dim, job.n_heads * job.rows);
  for (std::int64_t head = 0; head < job.n_heads; ++head) {
    const DecodeHead& h = job.heads[head];
    const auto* from = static_cast<const Storage*>(h.q.data);
    for_each_row(job, head, [&](std::int64_t row, std::int64_t n) {
      for (std::int64_t c = 0; c < d.q_width; c += kLanes)
        store(d.q + n * d.q_width + c, load_units<Storage, float>(from + row * h.q.stride, c, h.q.dim) * splat(job.scale_sign));
      h.state.top[row] = kMinusInfinity;
      h.state.sum[row] = 0;
      for (std::int64_t c = 0; c < d.v_width; c += kLanes) store(h.state.out + row * d.v_width + c, Floats{});
    });
  }
  for (std::int64_t i = 0; i < job.n_bands; ++i) {
    const Band& band = job.bands[i];
    for (std::int64_t block = band.k_begin; block < band.k_end; block += kDecodeBlock)
      decode_block<Storage>(d, job, band, block, smaller(kDecodeBlock, band.k_end - block));
  }
}

}  // namespace dattn::cpu::DATTN_ISA
