// cuBLASLt's C interface, as much of it as is used here, in declarations of our own: the library is loaded at run time, so
// building needs none of its headers, and the tests' stand-in (tests/standins/cublaslt) has the same. Where there is a real
// cublasLt.h, tests/standins/cublaslt/abi.cpp compares every line with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dattn::cublaslt {

using Handle = struct Context*;
using Product = struct ProductDescription*;
using Layout = struct LayoutDescription*;
using Preference = struct PreferenceDescription*;
using Stream = void*;  // cudaStream_t

enum Status : int { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };
enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };
enum ComputeType : int { kCompute32F = 68, kCompute32FFastTf32 = 77 };
enum Operation : int { kPlain = 0, kTransposed = 1 };
enum ProductAttribute : int {
  kTransposeA = 3,
  kTransposeB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLeading = 12,
  kBiasType = 26,
};
enum Epilogue : int { kEpilogueBias = 4, kEpilogueGeluAux = 32 | 128 };  // may be or-ed
enum PreferenceAttribute : int {
  kMaxWorkspace = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
};
inline constexpr std::uint32_t kNoReductionScheme = 0;

struct Algorithm {
  std::uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  std::size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct CublasLt {
  std::size_t (*get_version)() = nullptr;
  Status (*create)(Handle* handle) = nullptr;
  Status (*product_create)(Product* product, ComputeType compute, DataType scale) = nullptr;
  Status (*product_set)(Product product, ProductAttribute attribute, const void* value, std::size_t bytes) = nullptr;
  Status (*layout_create)(Layout* layout, DataType type, std::uint64_t rows, std::uint64_t columns,
                          std::int64_t leading) = nullptr;
  Status (*preference_create)(Preference* preference) = nullptr;
  Status (*preference_set)(Preference preference, PreferenceAttribute attribute, const void* value,
                           std::size_t bytes) = nullptr;
  Status (*get_heuristic)(Handle handle, Product product, Layout a, Layout b, Layout c, Layout d, Preference preference,
                          int wanted, Heuristic* found, int* count) = nullptr;
  Status (*matmul)(Handle handle, Product product, const void* alpha, const void* a, Layout a_layout, const void* b,
                   Layout b_layout, const void* beta, const void* c, Layout c_layout, void* d, Layout d_layout,
                   const Algorithm* algorithm, void* workspace, std::size_t workspace_bytes, Stream stream) = nullptr;
};

}  // namespace dattn::cublaslt
