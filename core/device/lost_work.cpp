#include "core/device/lost_work.h"

#include <atomic>
#include <mutex>

#include "core/base/error.h"

namespace dattn {
namespace {

std::atomic<int> g_count{0};
std::mutex g_mutex;
std::string g_reason;  // of the last one; ranks that are threads of one process have the same

}  // namespace

LostWork::LostWork(const std::string& reason) {
  const std::lock_guard lock(g_mutex);
  g_reason = reason;
  ++g_count;
}

LostWork::~LostWork() { --g_count; }

void check_lost_work() {
  if (g_count.load(std::memory_order_acquire) == 0) return;
  const std::lock_guard lock(g_mutex);
  throw Error(ErrorCode::kPeer, g_reason);
}

}  // namespace dattn
