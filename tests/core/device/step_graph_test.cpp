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
  // sum += term, `copies` times.
  void add_term(float term, int copies = 1) {
    for (int i = 0; i < copies; ++i) {
      const Tensor place = to_device(TensorView(&term, DType::kF32, {1}), testing::kCuda);
      add(place, *sum_);
    }
  }
  float sum() { return to_device(*sum_, Device{}).ptr<float>()[0]; }

  std::optional<Tensor> sum_;
};

TEST_F(StepGraphOnCuda, LaunchesWhatItCaptured) {
  const DeviceScope scope(testing::kCuda);
  sum_.emplace(DType::kF32, Shape{1});
  StepGraph graph;
  const std::array<std::int64_t, 1> one{1}, two{2};
  float expected = 0;
  for (const float term : {1.0f, 2.0f, 4.0f, 8.0f, 16.0f}) {  // as ever, captured, and again three times
    graph.run(one, [&] { add_term(term); });
    EXPECT_EQ(sum(), expected += term);
  }
  EXPECT_EQ(graph.replays(), 3);
  for (const float term : {32.0f, 64.0f, 128.0f}) {  // other work: captured anew
    graph.run(two, [&] { add_term(term, 2); });
    EXPECT_EQ(sum(), expected += 2 * term);
  }
  EXPECT_EQ(graph.replays(), 5);
}

TEST_F(StepGraphOnCuda, GoesOnAfterAnError) {
  const DeviceScope scope(testing::kCuda);
  sum_.emplace(DType::kF32, Shape{1});
  StepGraph graph;
  const std::array<std::int64_t, 1> key{1};
  for (int pass = 0; pass < 4; ++pass) {  // as ever, captured, again
    EXPECT_THROW(graph.run(key,
                           [&] {
                             add_term(1);
                             throw Error(ErrorCode::kBadInput, "no");
                           }),
                 Error);
    sum();
    graph.run(key, [&] { add_term(2); });
  }
  EXPECT_EQ(graph.replays(), 2);
}

TEST_F(StepGraphOnCuda, RefusesOtherCopiesUnderOneKeyAndReadingBack) {
  const DeviceScope scope(testing::kCuda);
  sum_.emplace(DType::kF32, Shape{1});
  StepGraph graph;
  const std::array<std::int64_t, 1> key{1};
  const auto refusal = [&](const std::function<void()>& step) -> std::string {
    try {
      graph.run(key, step);
    } catch (const Error& error) {
      return error.what();
    }
    return "taken";
  };
  for (int pass = 0; pass < 2; ++pass) graph.run(key, [&] { add_term(1); });
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
