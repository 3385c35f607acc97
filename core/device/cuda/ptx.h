// The machine instructions that kernels use beside CUDA C++, for compute capability 8.0 and above. Fragments of matrices lie
// over the 32 threads of a warp as in the PTX manual's "Matrix Fragments for mma.m16n8k16" (g = lane / 4, t = lane % 4):
//   a [16 x 16]: a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..), two halves a register
//   b [16 x 8]:  b[0] = (2t.., g), b[1] = (2t + 8.., g)
//   in TF32, a register each, a [16 x 8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b [8 x 8]: (t, g), (t + 4, g); so
//   the bytes of a register are at the same place of a tile's rows
//   c [16 x 8]:  c[0] = (g, 2t), c[1] = (g, 2t + 1), c[2] = (g + 8, 2t), c[3] = (g + 8, 2t + 1)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dattn::cuda {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Numbers that tensor cores multiply. TF32: fp32 whose last 13 bits are taken to be 0.
enum class Factor : std::uint8_t { kBF16, kF16, kTF32 };
template <Factor kFactor>
inline constexpr int kFactorBytes = kFactor == Factor::kTF32 ? 4 : 2;

// c += a b with fp32 sums, over 32 bytes of factors: 16 halves, 8 TF32.
template <Factor kFactor>
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (kFactor == Factor::kBF16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kFactor == Factor::kTF32) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 matrices of 16-bit numbers, or, not transposed, 8 x 4 of 32 bits: lane i gives the address of row i % 8 of matrix
// i / 8 (16 bytes, aligned); register m of lane l is row l / 4, columns 2 (l % 4).. (of 32 bits: l % 4) of matrix m. _trans: of
// the matrix transposed.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// 16 bytes from device to shared memory without passing through registers; `bytes` of them (0..16), the rest zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* device, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(device), "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {  // until at most kPending groups of this thread are under way
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");  // what is read after it, arrived
}

// Two fp32 rounded to nearest even halves; `low` in the lower one.
template <Factor kFactor>
__device__ __forceinline__ std::uint32_t pack_halves(float low, float high) {
  std::uint32_t packed;
  if constexpr (kFactor == Factor::kBF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The nearest TF32, ties away from 0.
__device__ __forceinline__ std::uint32_t round_tf32(float x) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(x));
  return rounded;
}

// fp16, by its bits.
__device__ __forceinline__ float widen_f16(std::uint16_t bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(wide) : "h"(bits));
  return wide;
}
__device__ __forceinline__ std::uint16_t round_f16(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(bits) : "f"(x));
  return bits;
}

// x, about which the compiler knows nothing more: what is computed from it is not moved out of loops, where it would take
// registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// a * b, rounded: never fused with what is added to it.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }

// 2^x, about 2 ulp; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dattn::cuda
