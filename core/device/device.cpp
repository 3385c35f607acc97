#include "core/device/device.h"

#include "core/base/error.h"
#include "core/device/cuda_module.h"

namespace dattn {
namespace {

thread_local Device t_device;

void make_current(Device device) {
  if (device.is_cuda()) cuda_module().set_device(device.index);
  t_device = device;
}

}  // namespace

std::string to_text(Device device) { return device.is_cuda() ? fmt::format("cuda:{}", device.index) : "cpu"; }

Device current_device() { return t_device; }

DeviceScope::DeviceScope(Device device) : before_(t_device) {
  if (device == before_) return;
  if (device.is_cuda()) {
    std::string why;
    const std::size_t count = cuda_devices(why).size();
    if (static_cast<std::size_t>(device.index) >= count) {
      fail(ErrorCode::kSystem,
           "{} is asked for but this process sees {} CUDA device(s){}; use device=cpu, or see `dattn doctor`", to_text(device),
           count, why.empty() ? "" : ": " + why);
    }
  }
  make_current(device);
}

DeviceScope::~DeviceScope() {
  if (before_ == t_device) return;
  try {
    make_current(before_);
  } catch (const Error&) {  // the device was lost meanwhile: whoever uses it next hears it
    t_device = before_;
  }
}

}  // namespace dattn
