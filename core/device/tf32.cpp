#include "core/device/tf32.h"

#include <atomic>

namespace dattn {
namespace {

std::atomic<bool> g_allowed = false;

}  // namespace

void allow_tf32(bool allowed) { g_allowed = allowed; }
bool tf32_allowed() { return g_allowed; }

}  // namespace dattn
