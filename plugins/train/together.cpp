// Outcomes shared by all ranks (see together.h).
#include "plugins/train/together.h"

#include <algorithm>
#include <exception>
#include <string>

#include "core/base/error.h"

namespace dattn {

void before_throwing_together(Communicator& world) noexcept {
  try {
    world.barrier({.verb = "status"});
  } catch (...) {  // the others left already; what is thrown next says why
  }
}

void together(Communicator& world, std::string_view what, const std::function<void()>& work) {
  std::string outcome;  // empty: done; otherwise the code as one character, then the message
  std::exception_ptr raised;
  try {
    work();
  } catch (const Error& error) {
    if (world.size() == 1 || error.code() == ErrorCode::kPeer) throw;
    raised = std::current_exception();
    outcome = static_cast<char>('0' + error.exit_code()) + std::string(error.what());
  } catch (const std::exception& error) {
    if (world.size() == 1) throw;
    raised = std::current_exception();
    outcome = static_cast<char>('0' + static_cast<int>(ErrorCode::kSystem)) + std::string(error.what());
  }
  const std::vector<std::string> outcomes = world.gather_strings(outcome, {.verb = "status"});
  const auto failed = std::find_if(outcomes.begin(), outcomes.end(), [](const std::string& text) { return !text.empty(); });
  if (failed == outcomes.end()) return;
  before_throwing_together(world);
  if (raised) std::rethrow_exception(raised);
  fail(static_cast<ErrorCode>((*failed)[0] - '0'), "{} failed on rank {}: {}", what, failed - outcomes.begin(),
       failed->substr(1));
}

}  // namespace dattn
