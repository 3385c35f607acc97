// A few query rows against many keys, as when a model generates: nothing is packed, every key and value is read once
// and the pass runs at the speed of memory. The result is a state that is not normalised; the driver merges the states
// of several ranges of keys ("split KV", Dao et al., Flash-Decoding, 2023).
#pragma once

#include "core/attention/cpu/bands.h"
#include "core/attention/cpu/pack.h"
#include "core/attention/cpu/terms_text.h"

namespace dattn::cpu::DATTN_ISA {

constexpr std::int64_t kDecodeBlock = 64;  // keys between two updates of the maximum; a multiple of kLanes

DATTN_INLINE std::int64_t decode_floats(std::int64_t dim_qk) { return kDecodeRows * (padded(dim_qk) + kDecodeBlock); }
static std::int64_t decode_scratch(std::int64_t dim_qk, std::int64_t) { return decode_floats(dim_qk) * 4; }

// Asks for a row that is read soon. Rows of one head lie apart where heads lie side by side, and no processor foresees that.
template <class Storage>
DATTN_INLINE void prefetch_row(const Rows& rows, std::int64_t row) {
  const auto* from = reinterpret_cast<const char*>(static_cast<const Storage*>(rows.data) + row * rows.stride);
  for (std::int64_t byte = 0; byte < rows.dim * static_cast<std::int64_t>(sizeof(Storage)); byte += 64)
    __builtin_prefetch(from + byte);
}

// Scores of kLanes keys (fewer at the end: the rest is 0) for one query row. Asks for their values on the way.
template <class Storage>
DATTN_INLINE Floats score_keys(const float* q, const Rows& k, const Rows& v, std::int64_t key, std::int64_t count) {
  Floats part[kLanes];
  const auto* from = static_cast<const Storage*>(k.data) + key * k.stride;
  for (int i = 0; i < kLanes; ++i) {
    part[i] = Floats{};
    if (i >= count) continue;
    prefetch_row<Storage>(v, key + i);
    for (std::int64_t d = 0; d < k.dim; d += kLanes)
      part[i] += load(q + d) * load_units<Storage, float>(from + i * k.stride, d, k.dim);
  }
  transpose(part);
  Floats sum = part[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) sum += part[i];
  return sum;
}

// out[column, column + kWidth vectors) = out * rescale + sum over keys of p[key] * v[key]; each(i) is called for every key.
template <int kWidth, class Storage, class Each>
DATTN_INLINE void add_value_columns(float* out, float rescale, const float* p, const Rows& v, const Storage* from,
                                    std::int64_t column, std::int64_t count, const Each& each) {
  Floats acc[kWidth];
#pragma GCC unroll 8
  for (int c = 0; c < kWidth; ++c) acc[c] = load(out + column + c * kLanes) * splat(rescale);
  for (std::int64_t i = 0; i < count; ++i) {
    each(i);
#pragma GCC unroll 8
    for (int c = 0; c < kWidth; ++c)
      acc[c] += splat(p[i]) * load_units<Storage, float>(from + i * v.stride, column + c * kLanes, v.dim);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kWidth; ++c) store(out + column + c * kLanes, acc[c]);
}

// out[0, width) = out * rescale + sum over keys of p[key] * v[key], many columns at a time: whole cache lines of a row, and as
// many sums under way. Asks for the next block's keys on the way.
template <class Storage>
DATTN_INLINE void add_values(float* out, float rescale, const float* p, const Rows& k, const Rows& v, std::int64_t key,
                             std::int64_t count) {
  constexpr int kMany = 8;  // vectors
  const auto* from = static_cast<const Storage*>(v.data) + key * v.stride;
  const std::int64_t width = padded(v.dim);
  const auto nothing = [](std::int64_t) __attribute__((always_inline)){};
  const auto next_key = [&](std::int64_t i) __attribute__((always_inline)) {
    prefetch_row<Storage>(k, smaller(key + kDecodeBlock + i, k.count - 1));
  };
  std::int64_t column = 0;
  for (; column + kMany * kLanes <= width; column += kMany * kLanes) {
    if (column == 0)
      add_value_columns<kMany>(out, rescale, p, v, from, column, count, next_key);
    else
      add_value_columns<kMany>(out, rescale, p, v, from, column, count, nothing);
  }
  for (; column < width; column += kLanes) add_value_columns<1>(out, rescale, p, v, from, column, count, nothing);
}

// One row over the keys [begin, begin + count), count <= kDecodeBlock.
template <bool kTerms, class Storage>
DATTN_INLINE void decode_block(const DecodeJob& job, const Band& band, std::int64_t row, const float* q, float* p,
                               std::int64_t begin, std::int64_t count) {
  const Ints lanes = lane_numbers();
  Floats tops = splat(kMinusInfinity);
  if constexpr (kTerms) {
    for (std::int64_t i = 0; i < count; i += kLanes) store(p + i, score_keys<Storage>(q, job.k, job.v, begin + i, count - i));
    if (job.terms->scores) true_scores(*job.terms, band, row, begin, count, p, nullptr);
  }
  for (std::int64_t i = 0; i < count; i += kLanes) {
    Floats s = kTerms ? load(p + i) : score_keys<Storage>(q, job.k, job.v, begin + i, count - i);
    s = lanes < splat_int(static_cast<std::int32_t>(count - i)) ? s * splat(job.scale_log2) : splat(kMinusInfinity);
    tops = at_least(tops, s);
    store(p + i, s);
  }
  const float seen = maximum_of(tops), old = job.top[row];
  const float top = seen > old ? seen : old;
  const float finite = top == kMinusInfinity ? 0.0f : top;
  const float rescale = top == old ? 1.0f : exp2(splat(old - finite))[0];
  Floats sum{};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Floats e = exp2(load(p + i) - splat(finite));
    sum += e;
    store(p + i, e);
  }
  if constexpr (kTerms) {
    if (job.terms->drop_below != 0) {
      unsigned char bits[keep_bytes(kDecodeBlock)];
      keep_bits(*job.terms, band, row, 1, begin, count, bits, 0);
      const std::int64_t bit = first_bit(band, begin);
      for (std::int64_t i = 0; i < count; i += kLanes) store(p + i, keep_lanes(load(p + i), bits, bit + i));
    }
  }
  job.top[row] = top;
  job.sum[row] = job.sum[row] * rescale + sum_of(sum);
  add_values<Storage>(job.out + row * padded(job.v.dim), rescale, p, job.k, job.v, begin, count);
}

template <class Storage>
void decode(const DecodeJob& job) {
  Arena arena{reinterpret_cast<std::uintptr_t>(job.scratch)};
  const std::int64_t q_width = padded(job.q.dim), width = padded(job.v.dim);
  auto* q = take<float>(arena, kDecodeRows * q_width);
  auto* p = take<float>(arena, kDecodeBlock);
  const auto* from = static_cast<const Storage*>(job.q.data);
  for (std::int64_t row = 0; row < job.q.count; ++row) {
    for (std::int64_t d = 0; d < q_width; d += kLanes) {
      store(q + row * q_width + d, load_units<Storage, float>(from + row * job.q.stride, d, job.q.dim) * splat(job.scale_sign));
    }
    job.top[row] = kMinusInfinity;
    job.sum[row] = 0;
    for (std::int64_t d = 0; d < width; d += kLanes) store(job.out + row * width + d, Floats{});
  }
  for (std::int64_t i = 0; i < job.n_bands; ++i) {
    const Band& band = job.bands[i];
    for (std::int64_t block = band.k_begin; block < band.k_end; block += kDecodeBlock) {
      for (std::int64_t row = band.row_begin; row < band.row_end; ++row) {
        const KeyRange range = keys_of_row(band, row);
        const std::int64_t begin = larger(range.begin, block), end = smaller(range.end, block + kDecodeBlock);
        if (begin >= end) continue;
        if (job.terms == nullptr)
          decode_block<false, Storage>(job, band, row, q + row * q_width, p, begin, end - begin);
        else
          decode_block<true, Storage>(job, band, row, q + row * q_width, p, begin, end - begin);
      }
    }
  }
}

}  // namespace dattn::cpu::DATTN_ISA
