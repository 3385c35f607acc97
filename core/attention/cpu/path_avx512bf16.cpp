// AVX-512 with the bf16 dot product: two products a lane and cycle for bf16 storage; fp32 as in path_avx512.cpp.
#if defined(__x86_64__)
#define DATTN_ISA avx512bf16
#include "core/attention/cpu/path_text.h"
#include "core/attention/cpu/paths.h"

namespace dattn::cpu {
namespace {
constexpr Ops kFp32 = avx512bf16::ops_of<float, float>();
constexpr Ops kBf16 = avx512bf16::ops_of<avx512bf16::Half, avx512bf16::Pair>();
constexpr Ops kFp16 = avx512bf16::ops_of<avx512bf16::Binary16, float>();
}  // namespace

extern const Path kAvx512Bf16Path = {"avx512bf16", cpu_has_avx512bf16, &kFp32, &kBf16, &kFp16};

}  // namespace dattn::cpu
#endif
