// AVX-512 F, BW, DQ, VL; bf16 is widened to fp32 when packed. Compiled with those flags (core/CMakeLists.txt).
#if defined(__x86_64__)
#define DATTN_ISA avx512
#include "core/attention/cpu/path_text.h"
#include "core/attention/cpu/paths.h"

namespace dattn::cpu {
namespace {
constexpr Ops kFp32 = avx512::ops_of<float, float>();
constexpr Ops kBf16 = avx512::ops_of<avx512::Half, float>();
}  // namespace

extern const Path kAvx512Path = {"avx512", cpu_has_avx512, &kFp32, &kBf16};

}  // namespace dattn::cpu
#endif
