// AVX2 and FMA; bf16 and fp16 are widened to fp32 when packed. Compiled with -mavx2 -mfma (core/CMakeLists.txt).
#if defined(__x86_64__)
#define DATTN_ISA avx2
#include "core/attention/cpu/path_text.h"
#include "core/attention/cpu/paths.h"

namespace dattn::cpu {
namespace {
constexpr Ops kFp32 = avx2::ops_of<float, float>();
constexpr Ops kBf16 = avx2::ops_of<avx2::Half, float>();
constexpr Ops kFp16 = avx2::ops_of<avx2::Binary16, float>();
}  // namespace

extern const Path kAvx2Path = {"avx2", cpu_has_avx2, &kFp32, &kBf16, &kFp16};

}  // namespace dattn::cpu
#endif
