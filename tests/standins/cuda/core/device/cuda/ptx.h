// What core/device/cuda/ptx.h says, on the host: the same fragments, with the exchange done by the last thread of the warp.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/base/dtype.h"
#include "core/device/cuda/language.h"

namespace dattn::cuda {

enum class Factor : std::uint8_t { kBF16, kF16, kTF32 };
template <Factor kFactor>
inline constexpr int kFactorBytes = kFactor == Factor::kTF32 ? 4 : 2;

inline float widen_f16(std::uint16_t bits) {
  Float16 x;
  x.bits = bits;
  return static_cast<float>(x);
}
inline std::uint16_t round_f16(float x) { return x != x ? 0x7fffu : Float16(x).bits; }

namespace standin {

template <Factor kFactor>
float widen_half(std::uint32_t bits) {
  return kFactor == Factor::kBF16 ? std::bit_cast<float>(bits << 16) : widen_f16(static_cast<std::uint16_t>(bits));
}
template <Factor kFactor>
std::uint32_t round_half(float x) {
  if (kFactor == Factor::kF16) return round_f16(x);
  return x != x ? 0x7fffu : BFloat16(x).bits;
}

struct Mma {
  float* c;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

// Number i of a register.
template <Factor kFactor>
float factor_of(std::uint32_t bits, int i) {
  if constexpr (kFactor == Factor::kTF32)
    return std::bit_cast<float>(bits & 0xffffe000u);
  else
    return widen_half<kFactor>(i == 0 ? bits & 0xffffu : bits >> 16);
}

template <Factor kFactor>
void mma_warp(void* const* lanes) {
  constexpr int kEach = 4 / kFactorBytes<kFactor>, kDepth = 8 * kEach;  // numbers of a register, of a sum
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& from = *static_cast<const Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < kEach; ++j) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][kEach * (t + i / 2 * 4) + j] = factor_of<kFactor>(from.a[i], j);
      for (int i = 0; i < 2; ++i) b[kEach * (t + i * 4) + j][g] = factor_of<kFactor>(from.b[i], j);
    }
  }
  float sum[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* c = static_cast<const Mma*>(lanes[lane])->c;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) c[i] += sum[g + i / 2 * 8][2 * t + i % 2];
  }
}

struct LoadMatrix {
  std::uint32_t* r;
  const void* row;
};

template <bool kTranspose>
void load_matrices(void* const* lanes) {
  for (int m = 0; m < 4; ++m) {
    std::uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], static_cast<LoadMatrix*>(lanes[m * 8 + row])->row, 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const std::uint32_t low = kTranspose ? matrix[column][row] : matrix[row][column];
      const std::uint32_t high = kTranspose ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<LoadMatrix*>(lanes[lane])->r[m] = low | high << 16;
    }
  }
}

}  // namespace standin

template <Factor kFactor>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], standin::Place place = {}) {
  standin::Mma request{c, a, b};
  standin::warp_meet("mma", place, &request, standin::mma_warp<kFactor>);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, standin::Place place = {}) {
  standin::want_shared(row, 16, "ldmatrix_x4", place);
  standin::LoadMatrix request{r, row};
  standin::warp_meet("ldmatrix_x4", place, &request, standin::load_matrices<false>);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, standin::Place place = {}) {
  standin::want_shared(row, 16, "ldmatrix_x4_trans", place);
  standin::LoadMatrix request{r, row};
  standin::warp_meet("ldmatrix_x4_trans", place, &request, standin::load_matrices<true>);
}

inline void cp_async_16(void* shared, const void* device, int bytes, standin::Place place = {}) {
  standin::want_shared(shared, 16, "cp_async_16", place);
  if (bytes < 0 || bytes > 16) standin::give_up("cp_async_16", place, "%d bytes; 0 to 16", bytes);
  if (reinterpret_cast<std::uintptr_t>(device) % 16 != 0) {
    standin::give_up("cp_async_16", place, "device address %p is not a multiple of 16", device);
  }
  standin::start_copy({shared, device, bytes});
}
inline void cp_async_commit() { standin::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  standin::PendingCopy copy{};
  while (standin::next_due_copy(kPending, copy)) {
    unsigned char row[16] = {};
    std::memcpy(row, copy.from, static_cast<std::size_t>(copy.bytes));
    std::memcpy(copy.to, row, 16);
  }
}

template <Factor kFactor>
std::uint32_t pack_halves(float low, float high) {
  return standin::round_half<kFactor>(low) | standin::round_half<kFactor>(high) << 16;
}

inline std::uint32_t round_tf32(float x) {
  if (x != x) return 0x7fffffffu;
  return (std::bit_cast<std::uint32_t>(x) + 0x1000u) & 0xffffe000u;
}

inline int opaque(int x) { return x; }

inline float multiply_rounded(float a, float b) {
  const volatile float product = a * b;  // volatile: no fused multiply-add
  return product;
}
inline double multiply_rounded(double a, double b) {
  const volatile double product = a * b;
  return product;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // flushes what is not normal
}

}  // namespace dattn::cuda
