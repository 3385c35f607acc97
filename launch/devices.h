// Which device a rank computes on.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "core/config/config.h"
#include "core/device/device.h"
#include "parallel/comm/communicator.h"
#include "parallel/comm/nccl.h"

namespace dattn {

enum class DeviceChoice { kAuto, kCpu, kCuda };

template <>
struct ConfigNames<DeviceChoice> {
  static constexpr std::array<std::pair<std::string_view, DeviceChoice>, 3> kAll{
      {{"auto", DeviceChoice::kAuto}, {"cpu", DeviceChoice::kCpu}, {"cuda", DeviceChoice::kCuda}}};
};

// How device tensors travel between ranks: NCCL, or through host memory (parallel/comm/staged.h).
enum class Transfers { kAuto, kNccl, kStaged };

template <>
struct ConfigNames<Transfers> {
  static constexpr std::array<std::pair<std::string_view, Transfers>, 3> kAll{
      {{"auto", Transfers::kAuto}, {"nccl", Transfers::kNccl}, {"staged", Transfers::kStaged}}};
};

struct DeviceOptions {
  DeviceChoice device = DeviceChoice::kCpu;
  int ranks_per_device = 1;
  Transfers transfers = Transfers::kAuto;
  bool ordered_sums = true;  // sums over ranks in rank order, not NCCL's own
  bool tf32 = false;         // core/device/tf32.h
  NcclTuning nccl{};
  bool invariant = false;  // the bits are those of any mesh, so that all ranks must compute by the same instructions
  // Ends the process of a failed job whose device does not come to rest, so that the host is not held up for ever.
  std::function<void(const JobEnd& end)> stuck{};
  std::string version{};  // of dattn, the same on all ranks; empty: this one's
};

// The device of the rank with this number on its host. auto: a CUDA device where the host has enough of them, else the cpu.
// Throws Error(kSystem) when cuda is asked for and there is none, Error(kBadInput) when there are too few.
Device choose_device(const DeviceOptions& options, int local_rank, int local_size);

// The world of ranks that compute on this thread's current device: `control` itself on the cpu. auto: NCCL where its library is
// found and no two ranks share a device (processes that do may ask for it by name: slow, over loopback sockets). All ranks make
// the call; they must have devices of one kind.
std::unique_ptr<Communicator> device_world(std::unique_ptr<Communicator> control, const DeviceOptions& options,
                                           double timeout_s);

// body(device_world) on the rank's device; the ranks of `control` are on this host, numbered by local_rank.
void run_on_device(const DeviceOptions& options, std::unique_ptr<Communicator> control, int local_rank, int local_size,
                   double timeout_s, const std::function<void(Communicator&)>& body);
// The same for ranks that are threads of this process.
void run_on_device(const DeviceOptions& options, Communicator& threads, double timeout_s,
                   const std::function<void(Communicator&)>& body);

}  // namespace dattn
