// The machine instructions of core/device/cuda/ptx.h as the stand-in has them, against plain computations.
#include "core/device/cuda/ptx.h"

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/dtype.h"
#include "core/base/philox.h"
#include "tests/standins/cuda/tests/support.h"

namespace dattn::cuda {
namespace {

using ::testing::HasSubstr;

std::string error_text() {
  const cudaError_t error = cudaStreamSynchronize(nullptr);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <class T>
std::vector<float> random_factors(std::uint64_t seed, std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(T(static_cast<float>(philox_normal(seed, 0, static_cast<std::uint64_t>(i)))));
  }
  return values;
}

// fp32 rounded to TF32.
struct Tf32 {
  float value;
  explicit Tf32(float x) : value(std::bit_cast<float>(round_tf32(x))) {}
  explicit operator float() const { return value; }
};

// c [16, 8] += a [16, 16] b [16, 8] (TF32: over 8), by fragments as the PTX manual lays them out.
template <Factor kFactor>
__global__ void multiply(const float* a, const float* b, float* c) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  // The registers at row g and place t of 8 in a row of a, or in a column of b.
  const auto from_a = [&](unsigned row, unsigned place) {
    if constexpr (kFactor == Factor::kTF32)
      return __float_as_uint(a[row * 8 + place]) | 0xfffu;  // what lies behind a TF32 does not count
    else
      return pack_halves<kFactor>(a[row * 16 + 2 * place], a[row * 16 + 2 * place + 1]);
  };
  const auto from_b = [&](unsigned place) {
    if constexpr (kFactor == Factor::kTF32)
      return __float_as_uint(b[place * 8 + g]) | 0x1fffu;
    else
      return pack_halves<kFactor>(b[2 * place * 8 + g], b[(2 * place + 1) * 8 + g]);
  };
  const std::uint32_t fa[4] = {from_a(g, t), from_a(g + 8, t), from_a(g, t + 4), from_a(g + 8, t + 4)};
  const std::uint32_t fb[2] = {from_b(t), from_b(t + 4)};
  float fc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  mma<kFactor>(fc, fa, fb);
  c[g * 8 + 2 * t] = fc[0];
  c[g * 8 + 2 * t + 1] = fc[1];
  c[(g + 8) * 8 + 2 * t] = fc[2];
  c[(g + 8) * 8 + 2 * t + 1] = fc[3];
}

template <Factor kFactor, class T>
void check_product() {
  constexpr std::size_t kDepth = 32 / kFactorBytes<kFactor>;
  const std::vector<float> a = random_factors<T>(1, 16 * kDepth), b = random_factors<T>(2, kDepth * 8),
                           c = random_factors<T>(3, 16 * 8);
  const Array<float> on_a(a), on_b(b), on_c(c);
  launch(multiply<kFactor>, dim3(1), dim3(32), 0, nullptr, on_a.data(), on_b.data(), on_c.data());
  EXPECT_EQ(error_text(), "");
  const std::vector<float> got = on_c.values();
  for (std::size_t row = 0; row < 16; ++row) {
    for (std::size_t column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column];
      for (std::size_t k = 0; k < kDepth; ++k) sum += double{a[row * kDepth + k]} * double{b[k * 8 + column]};
      EXPECT_NEAR(got[row * 8 + column], sum, 1e-5);
    }
  }
}

TEST(CudaStandinPtx, MatrixProduct) {
  check_product<Factor::kBF16, BFloat16>();
  check_product<Factor::kF16, Float16>();
  check_product<Factor::kTF32, Tf32>();
}

// Shared memory holds 32 rows of 8 numbers, number i at place i; matrix m is rows 8 m ...
template <bool kTranspose>
__global__ void load_matrices(std::uint32_t* out, int shift) {
  DATTN_SHARED_MEMORY(memory);
  auto* const numbers = reinterpret_cast<std::uint16_t*>(memory);
  for (unsigned i = 0; i < 8; ++i) numbers[threadIdx.x * 8 + i] = static_cast<std::uint16_t>(threadIdx.x * 8 + i);
  __syncwarp();
  std::uint32_t r[4];
  const unsigned char* row = memory + threadIdx.x * 16 + shift;
  if (kTranspose)
    ldmatrix_x4_trans(r, row);
  else
    ldmatrix_x4(r, row);
  for (unsigned m = 0; m < 4; ++m) out[threadIdx.x * 4 + m] = r[m];
}

TEST(CudaStandinPtx, LoadsMatrices) {
  for (const bool transpose : {false, true}) {
    const Array<std::uint32_t> out(32 * 4);
    launch(transpose ? load_matrices<true> : load_matrices<false>, dim3(1), dim3(32), 512, nullptr, out.data(), 0);
    EXPECT_EQ(error_text(), "");
    const std::vector<std::uint32_t> got = out.values();
    for (std::uint32_t lane = 0; lane < 32; ++lane) {
      for (std::uint32_t m = 0; m < 4; ++m) {
        const std::uint32_t row = lane / 4, column = lane % 4 * 2;
        const auto number = [&](std::uint32_t i, std::uint32_t j) { return m * 64 + (transpose ? j * 8 + i : i * 8 + j); };
        EXPECT_EQ(got[lane * 4 + m], number(row, column) | number(row, column + 1) << 16);
      }
    }
  }
}

TEST(CudaStandinPtx, AddressesAreChecked) {
  const Array<std::uint32_t> out(32 * 4);
  launch(load_matrices<false>, dim3(1), dim3(32), 528, nullptr, out.data(), 2);
  EXPECT_THAT(error_text(), HasSubstr("of shared memory is not a multiple of 16"));
  launch(load_matrices<true>, dim3(1), dim3(32), 512, nullptr, out.data(), 16);
  EXPECT_THAT(error_text(), HasSubstr("address at byte 512 of 512 bytes of shared memory"));
}

// Two groups of one copy each; what is in shared memory after every step.
__global__ void copy_asynchronously(const float* from, float* seen) {
  DATTN_SHARED_MEMORY(memory);
  auto* const shared = reinterpret_cast<float*>(memory);
  const auto look = [&](int step) {
    for (int i = 0; i < 8; ++i) seen[step * 8 + i] = shared[i];
  };
  cp_async_16(shared, from, 16);
  cp_async_commit();
  cp_async_16(shared + 4, from + 4, 8);
  cp_async_commit();
  look(0);
  cp_async_wait<1>();
  look(1);
  cp_async_wait<0>();
  look(2);
}

TEST(CudaStandinPtx, CopiesArriveWhenWaitedFor) {
  const Array<float> from(std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8}), seen(24);
  launch(copy_asynchronously, dim3(1), dim3(1), 64, nullptr, from.data(), seen.data());
  EXPECT_EQ(error_text(), "");
  const std::vector<float> got = seen.values();
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_TRUE(std::isnan(got[i]));
    const float first = static_cast<float>(i + 1);
    EXPECT_TRUE(i < 4 ? got[8 + i] == first : std::isnan(got[8 + i])) << i;
    EXPECT_EQ(got[16 + i], i < 6 ? first : 0.0f);  // 8 of 16 bytes, the rest zeros
  }
}

__global__ void copy_misaligned(const float* from) {
  DATTN_SHARED_MEMORY(memory);
  cp_async_16(memory, from + 1, 16);
}

TEST(CudaStandinPtx, MisalignedCopiesAreRefused) {
  const Array<float> from(8);
  launch(copy_misaligned, dim3(1), dim3(1), 64, nullptr, from.data());
  EXPECT_THAT(error_text(), HasSubstr("is not a multiple of 16"));
}

TEST(CudaStandinPtx, Numbers) {
  for (const float x : {0.0f, 1.0f, -3.14159f, 1.00390625f, 1e30f, 0x1.fffffep+127f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(pack_halves<Factor::kBF16>(x, -x), BFloat16(x).bits | std::uint32_t{BFloat16(-x).bits} << 16) << x;
    EXPECT_EQ(pack_halves<Factor::kF16>(x, -x), Float16(x).bits | std::uint32_t{Float16(-x).bits} << 16) << x;
    EXPECT_EQ(widen_f16(round_f16(x)), static_cast<float>(Float16(x))) << x;
  }
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(pack_halves<Factor::kBF16>(NAN, 0) << 16)));
  for (const auto& [x, nearest] : {std::pair{1.0f, 1.0f},
                                   {0x1.001p0f, 1.0f},
                                   {0x1.002p0f, 0x1.004p0f},
                                   {-0x1.002p0f, -0x1.004p0f},
                                   {0x1.001ffep0f, 1.0f},
                                   {0x1.ffep0f, 2.0f}}) {
    EXPECT_EQ(std::bit_cast<float>(round_tf32(x)), nearest) << x;
  }
  EXPECT_TRUE(std::isinf(std::bit_cast<float>(round_tf32(0x1.fffffep+127f))));
  EXPECT_TRUE(std::isinf(std::bit_cast<float>(round_tf32(-INFINITY))));
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(round_tf32(std::bit_cast<float>(0x7fffffffu)))));
  EXPECT_EQ(exp2_fast(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp2_fast(-140.0f), 0.0f);  // not a normal number
  EXPECT_FLOAT_EQ(exp2_fast(3.5f), std::exp2(3.5f));
}

}  // namespace
}  // namespace dattn::cuda
