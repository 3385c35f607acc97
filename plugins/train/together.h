// Work that each rank does on its own and that may fail on some of them only (files, memory): the outcome is exchanged,
// so that either all ranks go on or all end with the same message, naming the rank that failed.
#pragma once

#include <functional>
#include <string_view>

#include "parallel/comm/communicator.h"

namespace dattn {

// Runs `work` here and waits for the other ranks' outcomes. Where it threw on some rank, every rank throws an Error with
// the code and the message of the first of these ranks.
void together(Communicator& world, std::string_view what, const std::function<void()>& work);

// Called by every rank just before all of them throw the same error: a rank that threw at once would end the waits of
// others, which would then report a lost peer instead. Never throws.
void before_throwing_together(Communicator& world) noexcept;

}  // namespace dattn
