// Device work that was cut short. When a job fails, transfers under way are aborted so that streams run empty and the host
// does not hang; what lies on the devices then is not what was computed. So from that moment every synchronisation of the host
// with a device, in any thread, throws Error(kPeer) with the job's reason instead of returning.
#pragma once

#include <string>

namespace dattn {

// Holds from its construction until it goes.
class LostWork {
 public:
  explicit LostWork(const std::string& reason);
  ~LostWork();
  LostWork(const LostWork&) = delete;
  LostWork& operator=(const LostWork&) = delete;
};

void check_lost_work();  // after every synchronisation; costs one atomic read

}  // namespace dattn
