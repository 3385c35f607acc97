// Errors carry a code, a formatted message and the thread's context.
#include "core/base/error.h"

#include <string>
#include <thread>

#include <gtest/gtest.h>

namespace dattn {
namespace {

template <class F>
std::string message_of(F&& f, ErrorCode expected) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), expected);
    EXPECT_EQ(error.exit_code(), static_cast<int>(expected));
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Error, CodesAreTheProcessExitCodes) {
  EXPECT_EQ(static_cast<int>(ErrorCode::kInternal), 1);
  EXPECT_EQ(static_cast<int>(ErrorCode::kBadInput), 2);
  EXPECT_EQ(static_cast<int>(ErrorCode::kPeer), 3);
}

TEST(Error, RequireEnsureAndFailFormatTheirMessages) {
  EXPECT_EQ(message_of([] { require(false, "{} of {}", 3, "four"); }, ErrorCode::kBadInput), "3 of four");
  EXPECT_EQ(message_of([] { ensure(false, "broken"); }, ErrorCode::kInternal), "broken");
  EXPECT_EQ(message_of([] { fail(ErrorCode::kPeer, "gone"); }, ErrorCode::kPeer), "gone");
  EXPECT_NO_THROW(require(true, "fine"));
  EXPECT_NO_THROW(ensure(true, "fine"));
}

TEST(Error, ContextBelongsToItsThread) {
  set_error_context("rank 3/8");
  EXPECT_EQ(message_of([] { require(false, "no"); }, ErrorCode::kBadInput), "no [rank 3/8]");
  std::thread([] { EXPECT_EQ(message_of([] { require(false, "no"); }, ErrorCode::kBadInput), "no"); }).join();
  set_error_context("");
  EXPECT_EQ(message_of([] { require(false, "no"); }, ErrorCode::kBadInput), "no");
}

}  // namespace
}  // namespace dattn
