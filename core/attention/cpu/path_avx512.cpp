// AVX-512 F, BW, DQ, VL; bf16 and fp16 are widened to fp32 when packed. Compiled with those flags (core/CMakeLists.txt).
#if defined(__x86_64__)
#define DATTN_ISA avx512
#include "core/attention/cpu/path_text.h"
#include "core/attention/cpu/paths.h"

namespace dattn::cpu {
namespace {
constexpr Ops kFp32 = avx512::ops_of<float, float>();
constexpr Ops kBf16 = avx512::ops_of<avx512::Half, float>();
constexpr Ops kFp16 = avx512::ops_of<avx512::Binary16, float>();
}  // namespace

extern const Path kAvx512Path = {"avx512", cpu_has_avx512, &kFp32, &kBf16, &kFp16};

}  // namespace dattn::cpu
#endif
