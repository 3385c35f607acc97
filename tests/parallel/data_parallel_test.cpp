// Gradient sums and the global norm on meshes, against sums written out by hand.
#include "parallel/data_parallel.h"

#include <cmath>
#include <memory>

#include <gtest/gtest.h>

#include "core/base/philox.h"
#include "core/nn/optimizer.h"
#include "parallel/comm/decorators.h"
#include "parallel/comm/thread.h"
#include "tests/parallel/mesh_of.h"

namespace dattn {
namespace {

// Gradient of element `i` of the global tensor `stream` as rank `rank` computes it: small integers, exact in fp32.
float partial(int rank, std::uint64_t stream, std::int64_t i) {
  return std::floor(philox_uniform(static_cast<std::uint64_t>(rank) + 11, stream, static_cast<std::uint64_t>(i)) * 16.0f) -
         8.0f;
}

Parameter make_parameter(std::string name, const Shape& global, Interval held, Interval owned, bool over_tensor) {
  Parameter p;
  p.name = std::move(name);
  p.global_shape = global;
  p.held = held;
  p.owned = owned;
  p.sum_over_tensor = over_tensor;
  Shape local = global;
  local[0] = held.count();
  p.value = Tensor(DType::kF32, local);
  p.gradient = Tensor(DType::kF32, local);
  return p;
}

void fill(Parameter& p, int rank, std::uint64_t stream) {
  const std::int64_t width = p.global_shape.elements() / p.global_shape[0];
  for (std::int64_t i = 0; i < p.elements(); ++i) p.gradient.ptr<float>()[i] = partial(rank, stream, p.held.begin * width + i);
}

// Parameters as a transformer has them: replicated, cut, cut with an overlap (row 2 is held by both parts).
struct Model {
  std::vector<Parameter> parameters;
  std::vector<Parameter*> list;

  explicit Model(const Mesh& mesh) {
    const int part = mesh.coordinate(Axis::kTensor), parts = mesh.shape().size(Axis::kTensor);
    const Interval all3{0, 3}, all5{0, 5};
    parameters.push_back(make_parameter("norm", {3}, all3, part == 0 ? all3 : Interval{3, 3}, false));
    parameters.push_back(make_parameter("norm_flagged", {3}, all3, part == 0 ? all3 : Interval{3, 3}, true));
    const Interval cut = split_evenly(5, parts, part);
    parameters.push_back(make_parameter("cut", {5, 2}, cut, cut, false));
    const Interval held = parts == 1 ? all5 : part == 0 ? Interval{0, 3} : Interval{2, 5};
    const Interval owned = parts == 1 ? all5 : part == 0 ? Interval{0, 3} : Interval{3, 5};
    parameters.push_back(make_parameter("overlap", {5, 2}, held, owned, true));
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      // What tensor parts compute of a replicated, unflagged parameter is the same on all of them.
      fill(parameters[i], i == 0 ? mesh.replicas().rank() : mesh.rank(), i);
      list.push_back(&parameters[i]);
    }
  }
};

// The sum over the ranks that contribute to element i of parameter `stream`, for tensor sizes 1 and 2.
float expected(const MeshShape& shape, std::size_t stream, std::int64_t i, int tensor_part) {
  const int tensor = shape.size(Axis::kTensor);
  const int replicas = shape.ranks() / tensor;
  float sum = 0;
  for (int replica = 0; replica < replicas; ++replica) {
    for (int part = 0; part < tensor; ++part) {
      const int rank = replica * tensor + part;
      const std::int64_t row = i / 2;
      const bool holds = stream < 2 || tensor == 1 || (part == 0 ? row < 3 : row >= 2);
      if (stream == 0 && part == 0) sum += partial(replica, stream, i);
      if (stream == 1) sum += partial(rank, stream, i);
      if (stream == 2 && part == tensor_part) sum += partial(rank, stream, i);
      if (stream == 3 && holds) sum += partial(rank, stream, i);
    }
  }
  return sum;
}

class GradientSums : public testing::TestWithParam<std::array<int, 4>> {};

// Each rank has the sums of its share, and once it has updated that, all have all new values.
TEST_P(GradientSums, MatchSumsByHand) {
  const MeshShape shape = mesh_of(GetParam());
  for (const std::int64_t bucket_bytes : {1, 40, 4096}) {
    run_thread_ranks(shape.ranks(), {}, [&](Communicator& world) {
      const Mesh mesh(world, shape);
      Model model(mesh);
      GradientSync sync(mesh, model.list, bucket_bytes);
      sync.sum();
      for (const ParameterRun& run : sync.own()) copy(run.of(run.parameter->gradient), run.of(run.parameter->value));
      sync.gather_values();
      for (std::size_t p = 0; p < model.parameters.size(); ++p) {
        const Parameter& parameter = model.parameters[p];
        const std::int64_t width = parameter.global_shape.elements() / parameter.global_shape[0];
        for (std::int64_t i = 0; i < parameter.elements(); ++i) {
          EXPECT_EQ(parameter.value.ptr<float>()[i],
                    expected(shape, p, parameter.held.begin * width + i, mesh.coordinate(Axis::kTensor)))
              << parameter.name << " element " << i << " buckets of " << bucket_bytes;
        }
      }
    });
  }
}

TEST_P(GradientSums, NormCountsEveryElementOnce) {
  const MeshShape shape = mesh_of(GetParam());
  double squares = 0;
  for (std::size_t p = 0; p < 4; ++p) {
    for (std::int64_t i = 0; i < (p < 2 ? 3 : 10); ++i) {
      const int part = shape.size(Axis::kTensor) == 2 && i / 2 >= 3 ? 1 : 0;
      squares += std::pow(expected(shape, p, i, part), 2);
    }
  }
  run_thread_ranks(shape.ranks(), {}, [&](Communicator& world) {
    const Mesh mesh(world, shape);
    Model model(mesh);
    GradientSync sync(mesh, model.list);
    sync.sum();
    double share = sync.squared_norm_share();
    world.all_reduce_sum(TensorView(&share, DType::kF64, {1}), {});
    EXPECT_DOUBLE_EQ(share, squares);
  });
}

INSTANTIATE_TEST_SUITE_P(Meshes, GradientSums,  // data, ring, ulysses, tensor
                         testing::Values(std::array{1, 1, 1, 1}, std::array{2, 1, 1, 1}, std::array{1, 1, 1, 2},
                                         std::array{2, 1, 1, 2}, std::array{1, 3, 1, 1}, std::array{2, 1, 2, 2}));

// Every element is in one share, whatever the buckets.
TEST(ParameterShares, CoverEachElementOnce) {
  Parameter a = make_parameter("a", {7, 3}, {0, 7}, {0, 7}, false), b = make_parameter("b", {10}, {0, 10}, {0, 10}, false);
  const std::array<Parameter*, 2> parameters{&a, &b};
  for (const int parts : {1, 2, 3, 5, 40}) {
    for (const std::int64_t bucket_bytes : {4, 36, 4096}) {
      for (int part = 0; part < parts; ++part) {
        const ParameterShares shares(parameters, parts, part, bucket_bytes);
        for (const ParameterRun& run : shares.own()) {
          const TensorView counts = run.of(run.parameter->value);
          for (std::int64_t i = 0; i < counts.elements(); ++i) ++counts.at<float>(i);
        }
      }
      for (Parameter* parameter : parameters) {
        for (std::int64_t i = 0; i < parameter->elements(); ++i) EXPECT_EQ(parameter->value.ptr<float>()[i], 1) << parts;
        fill_zero(parameter->value);
      }
    }
  }
}

// A rank of P receives (P - 1) / P of the gradients and as much of the values, and keeps the state of 1 / P.
TEST(ParameterShares, MoveWhatAnAllReduceMoves) {
  constexpr int kRanks = 4;
  run_thread_ranks(kRanks, {}, [](Communicator& world) {
    auto counter = std::make_shared<ByteCounter>();
    const auto group = counted(whole_group(world, "data"), counter);
    Parameter a = make_parameter("a", {48, 2}, {0, 48}, {0, 48}, false),
              b = make_parameter("b", {16, 2}, {0, 16}, {0, 16}, false);
    const std::array<Parameter*, 2> parameters{&a, &b};
    const ParameterShares shares(parameters, kRanks, world.rank(), 160);
    shares.sum_gradients(*group, {.verb = "gradient"});
    shares.gather_values(*group, {.verb = "values"});
    EXPECT_EQ(counter->by_verb()["gradient"].received, 128 * 4 * (kRanks - 1) / kRanks);
    EXPECT_EQ(counter->by_verb()["values"].received, 128 * 4 * (kRanks - 1) / kRanks);
    EXPECT_EQ(counter->by_verb()["values"].sent, shares.values_sent());
    std::int64_t held = 0;
    AdamW optimizer(shares.own(), {});
    for (const AdamW::Moments& moments : optimizer.moments()) held += moments.m->elements();
    EXPECT_EQ(held, 128 / kRanks);
  });
}

// One bucket is one all-reduce; a tiny bucket size makes one for each tensor.
TEST(GradientBuckets, AreFewForSmallTensors) {
  run_thread_ranks(2, {}, [](Communicator& world) {
    const auto operations = [&](std::int64_t bucket_bytes) {
      auto counter = std::make_shared<ByteCounter>();
      auto group = counted(world.split(std::array{0, 1}, "data"), counter);
      std::vector<Tensor> tensors;
      std::vector<TensorView> views;
      for (int i = 0; i < 5; ++i) views.push_back(tensors.emplace_back(DType::kF32, Shape{8}));
      all_reduce_in_buckets(*group, views, bucket_bytes, {.verb = "gradient"});
      return counter->by_verb()["gradient"].operations;
    };
    EXPECT_EQ(operations(1), 5 * operations(4096));
  });
}

}  // namespace
}  // namespace dattn
