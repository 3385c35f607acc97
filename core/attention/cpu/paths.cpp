#include "core/attention/cpu/paths.h"

#include <array>
#include <cstdlib>
#include <string_view>

#include "core/base/error.h"
#include "core/base/log.h"

namespace dattn::cpu {
namespace {

constexpr std::array kPaths{// of this build, best first
#ifdef DATTN_CPU_AVX512BF16
                            &kAvx512Bf16Path,
#endif
#ifdef DATTN_CPU_AVX512
                            &kAvx512Path,
#endif
#ifdef DATTN_CPU_AVX2
                            &kAvx2Path,
#endif
                            &kPortablePath};

const Path& best_path() {
  static const Path& best = []() -> const Path& {
    for (const Path* path : kPaths) {
      if (path->runs_here()) {
        note_once(fmt::format("cpu kernel: {}", path->name));
        return *path;
      }
    }
    return kPortablePath;
  }();
  return best;
}

}  // namespace

#if defined(__x86_64__)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Path& choose_path() {
  const char* forced = std::getenv("DATTN_CPU");
  if (forced == nullptr || *forced == '\0') return best_path();
  for (const Path* path : kPaths) {
    if (std::string_view(forced) != path->name) continue;
    require(path->runs_here(), "DATTN_CPU={}: this processor lacks these instructions; unset it to use {}", forced,
            best_path().name);
    return *path;
  }
  std::string known;
  for (const Path* path : kPaths) known += fmt::format("{}{}", known.empty() ? "" : ", ", path->name);
  fail(ErrorCode::kBadInput, "DATTN_CPU={} is unknown; this build has: {}", forced, known);
}

}  // namespace dattn::cpu
