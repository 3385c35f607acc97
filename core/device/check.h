// Checks of the work on a device, beyond what its own runtime reports. A failed transfer between devices may leave a stream
// empty and its runtime content, with memory that is not what was computed: a communicator that looks after such transfers
// leaves a check here, and every synchronisation of the host with that device asks it before it returns. A thread that left
// checks itself (a rank) asks only those; any other thread asks all.
#pragma once

#include <functional>

#include "core/device/device.h"

namespace dattn {

class DeviceCheck {
 public:
  // check: throws Error where the device's work is lost. Called by several threads, never after the destructor has returned.
  DeviceCheck(Device device, std::function<void()> check);
  ~DeviceCheck();
  DeviceCheck(const DeviceCheck&) = delete;
  DeviceCheck& operator=(const DeviceCheck&) = delete;
};

void check_device(Device device);  // after every synchronisation; costs one atomic read where there are no checks

}  // namespace dattn
