#include "core/device/check.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <utility>

namespace dattn {
namespace {

std::atomic<int> g_count{0};
std::shared_mutex g_mutex;

struct Entry {
  Device device;
  std::thread::id thread;
  std::function<void()> check;
};

std::map<const DeviceCheck*, Entry>& checks() {
  static std::map<const DeviceCheck*, Entry> all;
  return all;
}

}  // namespace

DeviceCheck::DeviceCheck(Device device, std::function<void()> check) {
  const std::lock_guard lock(g_mutex);
  checks()[this] = {device, std::this_thread::get_id(), std::move(check)};
  ++g_count;
}

DeviceCheck::~DeviceCheck() {
  const std::lock_guard lock(g_mutex);
  checks().erase(this);
  --g_count;
}

void check_device(Device device) {
  if (g_count.load(std::memory_order_acquire) == 0) return;
  const std::shared_lock lock(g_mutex);
  const auto self = std::this_thread::get_id();
  const bool own = std::any_of(checks().begin(), checks().end(), [&](const auto& one) { return one.second.thread == self; });
  for (const auto& [key, one] : checks()) {
    if (one.device == device && (!own || one.thread == self)) one.check();
  }
}

}  // namespace dattn
