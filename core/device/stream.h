// Streams and events: the order of work on a device. Every thread has one stream of its current device, on which all
// tensors are allocated, computed and freed; communicators have streams of their own, joined to it by events. On the cpu
// work is done when the call returns, and streams and events are empty.
#pragma once

#include "core/device/device.h"

namespace dattn {

class Event;

class Stream {
 public:
  explicit Stream(Device device);  // a new one, of high priority: for transfers beside computation
  ~Stream();
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&&) = delete;
  // A stream of the host program, which keeps it; nullptr: the device's default stream.
  static Stream borrowed(Device device, void* native) { return Stream(device, native); }

  Device device() const { return device_; }
  void* native() const { return native_; }  // cudaStream_t; nullptr on the cpu
  void wait(const Event& event) const;      // work given to the stream from now on starts after the event
  void synchronize() const;  // the host waits for all work given so far; throws Error(kSystem) with the device's error

 private:
  friend Stream current_stream();
  Stream(Device device, void* native) : device_(device), native_(native), owned_(false) {}

  Device device_;
  void* native_ = nullptr;
  bool owned_ = true;
};

Stream current_stream();  // this thread's, of its current device

// A point in a stream.
class Event {
 public:
  explicit Event(Device device);
  ~Event();
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;

  void record(const Stream& stream) const;
  bool done() const;         // has what was recorded been reached? True before the first record
  void synchronize() const;  // the host waits for it
  void* native() const { return native_; }

 private:
  Device device_;
  void* native_ = nullptr;
};

}  // namespace dattn
