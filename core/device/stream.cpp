#include "core/device/stream.h"

#include <array>
#include <mutex>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "core/device/check.h"
#include "core/device/cuda_module.h"

namespace dattn {
namespace {

constexpr std::size_t kMostDevices = 128;  // Device::index

// Streams of threads that have ended, for threads to come: they are never destroyed, since tensors may outlive their thread
// and are freed in the order of its stream.
struct FreeStreams {
  std::mutex mutex;
  std::array<std::vector<NativeStream>, kMostDevices> of_device;
};

FreeStreams& free_streams() {
  static auto* streams = new FreeStreams;
  return *streams;
}

std::size_t place_of(Device device) { return static_cast<unsigned char>(device.index); }

// The streams of one thread, by device; as many as it used, since a library loaded late has little room for what threads own.
struct OwnStreams {
  std::vector<NativeStream> of_device;

  NativeStream get(Device device) {
    if (of_device.size() <= place_of(device)) of_device.resize(place_of(device) + 1);
    NativeStream& own = of_device[place_of(device)];
    if (own != nullptr) return own;
    FreeStreams& free = free_streams();
    const std::lock_guard lock(free.mutex);
    std::vector<NativeStream>& idle = free.of_device[place_of(device)];
    if (idle.empty()) return own = cuda_module().make_stream(false);
    own = idle.back();
    idle.pop_back();
    return own;
  }
  OwnStreams() = default;
  OwnStreams(const OwnStreams&) = delete;
  OwnStreams& operator=(const OwnStreams&) = delete;
  ~OwnStreams() {
    FreeStreams& free = free_streams();
    const std::lock_guard lock(free.mutex);
    for (std::size_t i = 0; i < of_device.size(); ++i) {
      if (of_device[i] != nullptr) free.of_device[i].push_back(of_device[i]);
    }
  }
};

}  // namespace

Stream::Stream(Device device) : device_(device) {
  if (device.is_cuda()) {
    const DeviceScope scope(device);
    native_ = cuda_module().make_stream(true);
  }
}

Stream::~Stream() {
  if (native_ != nullptr && owned_) cuda_module().destroy_stream(native_);
}

Stream::Stream(Stream&& other) noexcept
    : device_(other.device_), native_(std::exchange(other.native_, nullptr)), owned_(other.owned_) {}

void Stream::wait(const Event& event) const {
  if (device_.is_cuda() && event.native() != nullptr) cuda_module().wait_event(native_, event.native());
}

void Stream::synchronize() const {
  if (!device_.is_cuda()) return;
  cuda_module().synchronize(native_);
  check_device(device_);
}

Stream current_stream() {
  thread_local OwnStreams own;
  const Device device = current_device();
  return device.is_cuda() ? Stream(device, own.get(device)) : Stream(device, nullptr);
}

Event::Event(Device device) : device_(device) {
  if (device.is_cuda()) {
    const DeviceScope scope(device);
    native_ = cuda_module().make_event();
  }
}

Event::~Event() {
  if (native_ != nullptr) cuda_module().destroy_event(native_);
}

Event::Event(Event&& other) noexcept : device_(other.device_), native_(std::exchange(other.native_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(native_, other.native_);
  return *this;
}

void Event::record(const Stream& stream) const {
  ensure(stream.device() == device_, "an event of {} is recorded on a stream of {}", to_text(device_),
         to_text(stream.device()));
  if (native_ != nullptr) cuda_module().record(native_, stream.native());
}

bool Event::done() const { return native_ == nullptr || cuda_module().event_done(native_); }

void Event::synchronize() const {
  if (native_ == nullptr) return;
  cuda_module().synchronize_event(native_);
  check_device(device_);
}

}  // namespace dattn
