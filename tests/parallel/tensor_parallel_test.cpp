// Boundaries of tensor and sequence parallelism: enter and leave against their definition, and each backward as the
// adjoint of its forward: sum over ranks of <f(x), y> = sum over ranks of <x, f_backward(y)>.
#include "parallel/tensor_parallel.h"

#include <cmath>
#include <map>
#include <mutex>
#include <numeric>

#include <gtest/gtest.h>

#include "core/base/philox.h"
#include "parallel/comm/decorators.h"
#include "parallel/comm/thread.h"
#include "parallel/sequence_parallel.h"

namespace dattn {
namespace {

constexpr std::int64_t kWidth = 3;

// Reproducible values, exact in fp32 sums: small integers.
Tensor integers(const Shape& shape, std::uint64_t stream) {
  Tensor tensor(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    tensor.ptr<float>()[i] = std::floor(philox_uniform(7, stream, static_cast<std::uint64_t>(i)) * 16.0f) - 8.0f;
  }
  return tensor;
}

double dot(const TensorView& a, const TensorView& b) {
  EXPECT_EQ(a.shape, b.shape);
  return std::inner_product(a.ptr<float>(), a.ptr<float>() + a.elements(), b.ptr<float>(), 0.0);
}

// Sum over all ranks of the numbers that they return.
double sum_over_ranks(int ranks, const std::function<double(Communicator&)>& body) {
  std::mutex mutex;
  double sum = 0;
  run_thread_ranks(ranks, {}, [&](Communicator& world) {
    const double mine = body(world);
    const std::lock_guard lock(mutex);
    sum += mine;
  });
  return sum;
}

class Boundaries : public testing::TestWithParam<std::pair<int, std::int64_t>> {};

TEST_P(Boundaries, TensorLeaveSumsInRankOrder) {
  const auto [ranks, rows] = GetParam();
  run_thread_ranks(ranks, {}, [&](Communicator& world) {
    TensorBoundary boundary(world);
    Tensor left = boundary.leave(integers({rows, kWidth}, static_cast<std::uint64_t>(world.rank())), rows);
    Tensor expected(DType::kF32, {rows, kWidth});
    for (int r = 0; r < world.size(); ++r) add(integers({rows, kWidth}, static_cast<std::uint64_t>(r)), expected);
    for (std::int64_t i = 0; i < expected->elements(); ++i) EXPECT_EQ(left.ptr<float>()[i], expected.ptr<float>()[i]);
  });
}

TEST_P(Boundaries, SequenceEnterGathersRows) {
  const auto [ranks, rows] = GetParam();
  run_thread_ranks(ranks, {}, [&](Communicator& world) {
    SequenceBoundary boundary(world);
    Tensor whole = integers({rows, kWidth}, 1);
    Tensor own = Tensor::uninitialized(DType::kF32, {boundary.residual_rows(rows), kWidth});
    copy(whole->slice(0, boundary.residual_begin(rows), own->size(0)), own);
    Tensor entered = boundary.enter(std::move(own), rows);
    ASSERT_EQ(entered->shape, whole->shape);
    for (std::int64_t i = 0; i < whole->elements(); ++i) EXPECT_EQ(entered.ptr<float>()[i], whole.ptr<float>()[i]);
  });
}

TEST_P(Boundaries, SequenceLeaveIsTensorLeaveCutIntoRows) {
  const auto [ranks, rows] = GetParam();
  run_thread_ranks(ranks, {}, [&](Communicator& world) {
    SequenceBoundary sequence(world);
    TensorBoundary tensor(world);
    const auto input = [&] { return integers({rows, kWidth}, static_cast<std::uint64_t>(world.rank())); };
    Tensor own = sequence.leave(input(), rows);
    Tensor whole = tensor.leave(input(), rows);
    ASSERT_EQ(own->size(0), sequence.residual_rows(rows));
    const float* expected = whole.ptr<float>() + sequence.residual_begin(rows) * kWidth;
    for (std::int64_t i = 0; i < own->elements(); ++i) EXPECT_EQ(own.ptr<float>()[i], expected[i]);
  });
}

// The tensor boundary's input of enter, and output of leave, is one value that all ranks hold: it counts once.
TEST_P(Boundaries, BackwardsAreAdjoint) {
  const auto [ranks, rows] = GetParam();
  const auto stream = [](Communicator& world, int offset) { return static_cast<std::uint64_t>(world.rank() + offset); };
  const auto check = [&](const char* what, auto&& forward, auto&& backward) {
    EXPECT_EQ(sum_over_ranks(ranks, forward), sum_over_ranks(ranks, backward)) << what;
  };
  const Shape whole{rows, kWidth};
  check(
      "sequence enter",
      [&](Communicator& world) {
        SequenceBoundary b(world);
        return dot(b.enter(integers({b.residual_rows(rows), kWidth}, stream(world, 0)), rows),
                   integers(whole, stream(world, 100)));
      },
      [&](Communicator& world) {
        SequenceBoundary b(world);
        return dot(integers({b.residual_rows(rows), kWidth}, stream(world, 0)),
                   b.enter_backward(integers(whole, stream(world, 100)), rows));
      });
  check(
      "sequence leave",
      [&](Communicator& world) {
        SequenceBoundary b(world);
        return dot(b.leave(integers(whole, stream(world, 0)), rows),
                   integers({b.residual_rows(rows), kWidth}, stream(world, 100)));
      },
      [&](Communicator& world) {
        SequenceBoundary b(world);
        return dot(integers(whole, stream(world, 0)),
                   b.leave_backward(integers({b.residual_rows(rows), kWidth}, stream(world, 100)), rows));
      });
  check(
      "tensor enter",
      [&](Communicator& world) {
        TensorBoundary b(world);
        return dot(b.enter(integers(whole, 0), rows), integers(whole, stream(world, 100)));
      },
      [&](Communicator& world) {
        TensorBoundary b(world);
        const double d = dot(integers(whole, 0), b.enter_backward(integers(whole, stream(world, 100)), rows));
        return world.rank() == 0 ? d : 0.0;
      });
  check(
      "tensor leave",
      [&](Communicator& world) {
        TensorBoundary b(world);
        const double d = dot(b.leave(integers(whole, stream(world, 0)), rows), integers(whole, 100));
        return world.rank() == 0 ? d : 0.0;
      },
      [&](Communicator& world) {
        TensorBoundary b(world);
        return dot(integers(whole, stream(world, 0)), b.leave_backward(integers(whole, 100), rows));
      });
}

INSTANTIATE_TEST_SUITE_P(RanksAndRows, Boundaries,
                         testing::Values(std::pair{1, 4}, std::pair{2, 8}, std::pair{2, 7}, std::pair{3, 7}, std::pair{4, 3},
                                         std::pair{4, 1}),
                         [](const auto& example) {
                           return "ranks" + std::to_string(example.param.first) + "_rows" +
                                  std::to_string(example.param.second);
                         });

// A gather of N rows brings each rank the rows that it does not hold; the scatter's verb is counted apart.
TEST(BoundaryBytes, AreCountedByVerb) {
  run_thread_ranks(2, {}, [&](Communicator& world) {
    auto counter = std::make_shared<ByteCounter>();
    const auto everyone = std::array{0, 1};
    auto counting = counted(world.split(everyone, "tensor"), counter);
    SequenceBoundary boundary(*counting);
    (void)boundary.enter(integers({3, kWidth}, 1), 6);
    EXPECT_EQ(counter->by_verb()["sequence_gather"].received, 3 * kWidth * 4);
    (void)boundary.leave(integers({6, kWidth}, 1), 6);
    EXPECT_EQ(counter->by_verb()["sequence_scatter"].received, 3 * kWidth * 4);
  });
}

}  // namespace
}  // namespace dattn
