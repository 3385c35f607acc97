// The path for every other machine: vectors of four floats in the compiler's own notation (SSE2, NEON).
#define DATTN_ISA portable
#include "core/attention/cpu/path_text.h"
#include "core/attention/cpu/paths.h"

namespace dattn::cpu {
namespace {
constexpr Ops kFp32 = portable::ops_of<float, float>();
constexpr Ops kBf16 = portable::ops_of<portable::Half, float>();
constexpr Ops kFp16 = portable::ops_of<portable::Binary16, float>();
bool runs_here() { return true; }
}  // namespace

extern const Path kPortablePath = {"portable", runs_here, &kFp32, &kBf16, &kFp16};

}  // namespace dattn::cpu
