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

// A query row of one head. What the loops over keys need of it stands ready: for a key they have little more than four
// products.
struct DecodeRow {
  float* q;                // [D padded]
  float* products;         // [kLanes keys][kLanes]: q k, not summed yet
  float* p;                // [kDecodeBlock]: scores, then probabilities
  std::int64_t k, v;       // elements from the first head's key or value to its own
  std::int64_t row;        // of its head
  const Terms* terms;      // null: none
  float *out, *top, *sum;  // the state, out [V padded]
  KeyRange seen;           // of the keys of a block
};

struct Decode {
  DecodeRow *begin, *end;  // of all heads
  std::int64_t v_width;    // V padded
};

// Of q, products and p together.
DATTN_INLINE std::int64_t floats_of_row(std::int64_t dim_qk) { return padded(dim_qk) + kLanes * kLanes + kDecodeBlock; }

static std::int64_t decode_scratch(std::int64_t dim_qk, std::int64_t rows) {
  Arena arena{0};
  take<DecodeRow>(arena, rows);
  take<float>(arena, rows * floats_of_row(dim_qk));
  return static_cast<std::int64_t>(arena.next);
}

// The rows of a job, their states empty.
template <class Storage>
DATTN_INLINE Decode begin_decode(const DecodeJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  const std::int64_t q_width = padded(job.k.dim), n_rows = job.n_heads * job.rows;
  auto* to = take<DecodeRow>(arena, n_rows);
  auto* floats = take<float>(arena, n_rows * floats_of_row(job.k.dim));
  const Decode d{to, to + n_rows, padded(job.v.dim)};
  for (std::int64_t head = 0; head < job.n_heads; ++head) {
    const DecodeHead& from = job.heads[head];
    for (std::int64_t row = 0; row < job.rows; ++row, ++to) {
      to->q = floats;
      to->products = floats + q_width;
      to->p = to->products + kLanes * kLanes;
      floats = to->p + kDecodeBlock;
      to->k = from.kv * job.k_head;
      to->v = from.kv * job.v_head;
      to->row = row;
      to->terms = from.terms;
      to->out = from.state.out + row * d.v_width;
      to->top = from.state.top + row;
      to->sum = from.state.sum + row;
      *to->top = kMinusInfinity;
      *to->sum = 0;
      const auto* q = static_cast<const Storage*>(from.q.data) + row * from.q.stride;
      for (std::int64_t c = 0; c < q_width; c += kLanes)
        store(to->q + c, load_units<Storage, float>(q, c, job.k.dim) * splat(job.scale_sign));
      for (std::int64_t c = 0; c < d.v_width; c += kLanes) store(to->out + c, Floats{});
    }
  }
  return d;
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

// Scores of up to kLanes keys from `key` on for all rows, as columns from `column` on; those of keys past `count` are 0.
template <class Storage>
DATTN_INLINE void score_keys(const Decode& d, const DecodeJob& job, std::int64_t key, std::int64_t count, std::int64_t column) {
  const std::int64_t dim = job.k.dim;
  const auto* keys = static_cast<const Storage*>(job.k.data) + key * job.k.stride;
  for (std::int64_t i = 0; i < smaller(count, kLanes); ++i, keys += job.k.stride) {
    for (const DecodeRow* row = d.begin; row != d.end; ++row) {
      const float* q = row->q;
      Floats products{};
      for_each_vector(
          keys + row->k, dim, [&](std::int64_t c, Floats k) __attribute__((always_inline)) { products += load(q + c) * k; });
      store(row->products + i * kLanes, products);
    }
  }
  for (const DecodeRow* row = d.begin; row != d.end; ++row) {
    Floats products[kLanes];
    for (int i = 0; i < kLanes; ++i) products[i] = i < count ? load(row->products + i * kLanes) : Floats{};
    store(row->p + column, sums_of(products));
  }
}

// Scores of the keys that a row sees of the block from key `block` on become probabilities, others 0; its state follows the
// maximum.
DATTN_INLINE void softmax_row(const Decode& d, const DecodeJob& job, const Band& band, const DecodeRow& row,
                              std::int64_t block) {
  const Terms* terms = row.terms;
  float* p = row.p;
  if (terms != nullptr && terms->scores) true_scores(*terms, band, row.row, block, kDecodeBlock, p, nullptr);
  const Ints begin = splat_int(static_cast<std::int32_t>(row.seen.begin)),
             end = splat_int(static_cast<std::int32_t>(row.seen.end));
  Floats tops = splat(kMinusInfinity);
  for (int i = 0; i < kDecodeBlock; i += kLanes) {
    const Ints at = lane_numbers() + splat_int(i);
    const Floats s = ((at >= begin) & (at < end)) ? load(p + i) * splat(job.scale_log2) : splat(kMinusInfinity);
    tops = at_least(tops, s);
    store(p + i, s);
  }
  const float seen = maximum_of(tops), old = *row.top;
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
    keep_bits(*terms, band, row.row, 1, block, kDecodeBlock, bits, 0);
    for (std::int64_t i = 0; i < kDecodeBlock; i += kLanes)
      store(p + i, keep_lanes(load(p + i), bits, first_bit(band, block) + i));
  }
  *row.top = top;
  *row.sum = *row.sum * rescale + sum_of(sum);
  if (rescale == 1) return;
  for (std::int64_t c = 0; c < d.v_width; c += kLanes) store(row.out + c, load(row.out + c) * splat(rescale));
}

// out += p v for `count` keys from `key` on, of those that each row sees: 0 times what is hidden might be NaN.
template <class Storage>
DATTN_INLINE void add_values(const Decode& d, const DecodeJob& job, std::int64_t key, std::int64_t count) {
  const std::int64_t dim = job.v.dim;
  const auto* values = static_cast<const Storage*>(job.v.data) + key * job.v.stride;
  for (std::int64_t i = 0; i < count; ++i, values += job.v.stride) {
    for (const DecodeRow* row = d.begin; row != d.end; ++row) {
      if (i < row->seen.begin || i >= row->seen.end) continue;
      float* out = row->out;
      const Floats p = splat(row->p[i]);
      for_each_vector(
          values + row->v,
          dim, [&](std::int64_t c, Floats v) __attribute__((always_inline)) { store(out + c, load(out + c) + p * v); });
    }
  }
}

template <class Storage>
void decode(const DecodeJob& job) {
  const Decode d = begin_decode<Storage>(job);
  for (std::int64_t b = 0; b < job.n_bands; ++b) {
    const Band& band = job.bands[b];
    for (std::int64_t block = band.k_begin; block < band.k_end; block += kDecodeBlock) {
      const std::int64_t count = smaller(kDecodeBlock, band.k_end - block);
      for (DecodeRow* row = d.begin; row != d.end; ++row) {
        const KeyRange seen = keys_of_row(band, row->row);
        row->seen = {larger(seen.begin - block, 0), smaller(seen.end - block, count)};
      }
      for (std::int64_t i = 0; i < count; i += kLanes) score_keys<Storage>(d, job, block + i, count - i, i);
      for (const DecodeRow* row = d.begin; row != d.end; ++row) {
        if (row->seen.begin < row->seen.end) softmax_row(d, job, band, *row, block);
      }
      add_values<Storage>(d, job, block, count);
    }
  }
}

}  // namespace dattn::cpu::DATTN_ISA
