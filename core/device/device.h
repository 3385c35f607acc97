// Devices. One rule: what a thread allocates and computes lies on its current device, which is the cpu until a DeviceScope
// says otherwise; a rank sets it once. Views say where their memory is; functions of several tensors want them on one device.
#pragma once

#include <cstdint>
#include <string>

namespace dattn {

enum class DeviceKind : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  std::int8_t index = 0;  // of the CUDA devices that the process sees

  bool is_cuda() const { return kind == DeviceKind::kCuda; }
  bool operator==(const Device&) const = default;
};

std::string to_text(Device device);  // "cpu", "cuda:0"

Device current_device();  // of this thread

// Makes `device` this thread's current one until the end of the scope. Throws Error(kSystem), with what was looked for and
// where, when there is no such device.
class DeviceScope {
 public:
  explicit DeviceScope(Device device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  Device before_;
};

// What is known of the machine's CUDA devices without using one.
struct CudaDevice {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  std::int64_t memory_bytes = 0;
  std::string pci;       // bus number, as lspci and nvidia-smi write it
  std::string unusable;  // why this build cannot compute there, or nothing
};

}  // namespace dattn
