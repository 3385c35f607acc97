// A communicator whose messages the host program carries (dattn_callbacks of dattn.h). Groups of ranks are told apart by tags,
// so the host needs one group only.
#pragma once

#include <memory>

#include "parallel/comm/thread.h"
#include "plugins/c/dattn.h"

namespace dattn::c {

std::unique_ptr<Communicator> callback_world(const dattn_callbacks& callbacks, const CommOptions& options);

}  // namespace dattn::c
