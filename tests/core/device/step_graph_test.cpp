// A step as a graph: the numbers of ever new passes, one launch each, and what is refused.
#include "core/device/step_graph.h"

#include <array>
#include <functional>
#include <optional>
#include <string>

#include <gmock/gmock.h>

#include "core/base/error.h"
#include "core/device/stream.h"
#include "tests/core/device/on_cuda.h"

namespace dattn {
namespace {

using ::testing::HasSubstr;

class StepGraphOnCuda : public testing::OnCuda {
 protected:
  void SetUp() override {
    OnCuda::SetUp();
    if (IsSkipped()) return;
    scope_.emplace(testing::kCuda);
    sum_.emplace(DType::kF32, Shape{1});
    graph_.emplace();
  }
  // sum += term, `copies` times.
  void add_term(float term, int copies = 1) {
    for (int i = 0; i < copies; ++i) {
      const Tensor place = to_device(TensorView(&term, DType::kF32, {1}), testing::kCuda);
      add(place, *sum_);
    }
  }
  float sum() { return to_device(*sum_, Device{}).ptr<float>()[0]; }

  static constexpr std::array<std::int64_t, 1> kKey{1}, kOtherKey{2};
  std::optional<DeviceScope> scope_;
  std::optional<Tensor> sum_;
  std::optional<StepGraph> graph_;
};

TEST_F(StepGraphOnCuda, LaunchesWhatItCaptured) {
  float expected = 0;
  for (const float term : {1.0f, 2.0f, 4.0f, 8.0f, 16.0f}) {  // as ever, captured, and again three times
    graph_->run(kKey, [&] { add_term(term); });
    EXPECT_EQ(sum(), expected += term);
  }
  EXPECT_EQ(graph_->replays(), 3);
  for (const float term : {32.0f, 64.0f, 128.0f}) {  // other work: captured anew
    graph_->run(kOtherKey, [&] { add_term(term, 2); });
    EXPECT_EQ(sum(), expected += 2 * term);
  }
  EXPECT_EQ(graph_->replays(), 5);
}

TEST_F(StepGraphOnCuda, GoesOnAfterAnError) {
  for (int pass = 0; pass < 4; ++pass) {  // as ever, captured, again
    EXPECT_THROW(graph_->run(kKey,
                             [&] {
                               add_term(1);
                               throw Error(ErrorCode::kBadInput, "no");
                             }),
                 Error);
    sum();
    graph_->run(kKey, [&] { add_term(2); });
  }
  EXPECT_EQ(graph_->replays(), 2);
}

TEST_F(StepGraphOnCuda, RefusesOtherCopiesUnderOneKeyAndReadingBack) {
  const auto refusal = [&](const std::function<void()>& step) -> std::string {
    try {
      graph_->run(kKey, step);
    } catch (const Error& error) {
      return error.what();
    }
    return "taken";
  };
  for (int pass = 0; pass < 2; ++pass) graph_->run(kKey, [&] { add_term(1); });
  EXPECT_THAT(refusal([&] { add_term(1, 2); }), HasSubstr("of 1 copies when it was captured with the same key"));
  EXPECT_THAT(refusal([] {}), HasSubstr("made 0 copies from the host, 1 when it was captured"));
  EXPECT_THAT(refusal([&] {
                add_term(1);
                sum();
              }),
              HasSubstr("reads memory of the device back"));
}

}  // namespace
}  // namespace dattn
