// The instruction sets this build holds and the one this process uses.
#pragma once

#include "core/attention/cpu/ops.h"

namespace dattn::cpu {

extern const Path kPortablePath;
extern const Path kAvx2Path;  // x86-64 only, like the next two, and only where DATTN_CPU_PATHS names it
extern const Path kAvx512Path;
extern const Path kAvx512Bf16Path;

bool cpu_has_avx2();
bool cpu_has_avx512();
bool cpu_has_avx512bf16();

// The best path that runs here; DATTN_CPU=avx512bf16|avx512|avx2|portable forces one, and is read on every call.
// Throws Error(kBadInput) for a name that is unknown or does not run here.
const Path& choose_path();

}  // namespace dattn::cpu
