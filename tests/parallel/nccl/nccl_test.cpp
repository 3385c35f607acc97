// The NCCL back end over the stand-ins of NCCL and of the CUDA module: every case of a communicator on device tensors, what
// only devices have (overlap, sums by NCCL, lent communicators), and the staged back end that does without NCCL.
#include "parallel/comm/nccl.h"

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/philox.h"
#include "core/device/stream.h"
#include "parallel/comm/decorators.h"
#include "parallel/comm/staged.h"
#include "tests/parallel/comm/cases.h"
#include "tests/parallel/nccl/job.h"

namespace dattn::test {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

class OnDevices : public testing::TestWithParam<std::tuple<std::size_t, int>> {};

TEST_P(OnDevices, OverNccl) {
  const auto& [index, ranks] = GetParam();
  run_nccl_ranks(ranks, {.timeout_s = 60}, collective_cases()[index].run);
}

TEST(Nccl, MaximaWhereSumsAreItsOwn) {
  for (const auto& one : collective_cases()) {
    if (one.name == "AllReduceMax") run_nccl_ranks(3, {.timeout_s = 60, .ordered_sums = false}, one.run);
  }
}

TEST_P(OnDevices, OverNcclWithCallsChecked) {
  const auto& [index, ranks] = GetParam();
  run_nccl_ranks(ranks, {.timeout_s = 60, .check_calls = true}, collective_cases()[index].run);
}

TEST_P(OnDevices, Staged) {
  const auto& [index, ranks] = GetParam();
  run_device_ranks(
      ranks, 60, [](auto control) { return staged(std::move(control)); }, collective_cases()[index].run);
}

INSTANTIATE_TEST_SUITE_P(Cases, OnDevices,
                         testing::Combine(testing::Range(std::size_t{0}, collective_cases().size()), testing::Range(1, 5)),
                         [](const auto& param) {
                           return collective_cases()[std::get<0>(param.param)].name + std::to_string(std::get<1>(param.param));
                         });

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void send(Communicator& group, int peer, const TensorView& data, const OpLabel& label) {
  const SendPart part{peer, data.data, static_cast<std::size_t>(data.bytes()), data.device};
  group.exchange({&part, 1}, {}, label);
}
void receive(Communicator& group, int peer, const TensorView& data, const OpLabel& label) {
  const RecvPart part{peer, data.data, static_cast<std::size_t>(data.bytes()), data.device};
  group.exchange({}, {&part, 1}, label);
}

TEST(Nccl, HostIsNotHeldUpByTransfers) {
  run_nccl_ranks(2, {.timeout_s = 60}, [](Communicator& world) {
    const Tensor data(DType::kF32, Shape{1000});
    world.all_gather(data, std::array<std::int64_t, 2>{500, 500}, {});  // connected
    current_stream().synchronize();
    world.barrier({});
    if (world.rank() == 1) {
      std::this_thread::sleep_for(milliseconds(400));
      return send(world, 0, data, {.verb = "late"});
    }
    const auto begin = std::chrono::steady_clock::now();
    receive(world, 1, data, {.verb = "late"});
    EXPECT_LT(seconds_since(begin), 0.2);
    current_stream().synchronize();
    EXPECT_GT(seconds_since(begin), 0.3);
  });
}

// What is received may be used, and what was sent changed, by work given to the current stream after the wait alone.
TEST(Nccl, StreamsAreJoinedByEvents) {
  run_nccl_ranks(3, {.timeout_s = 60}, [](Communicator& world) {
    Tensor value(DType::kF32, Shape{200000}), sum(DType::kF32, Shape{200000}), in(DType::kF32, Shape{200000});
    Tensor one(DType::kF32, Shape{200000});
    const DeviceScope host(Device{});
    Tensor start = Tensor::uninitialized(DType::kF32, Shape{200000});
    std::fill_n(start.ptr<float>(), 200000, static_cast<float>(world.rank()));
    const DeviceScope device(value->device);
    copy(start, value);
    for (int step = 0; step < 20; ++step) {
      const SendPart out{(world.rank() + 1) % 3, value->data, static_cast<std::size_t>(value->bytes()), value->device};
      const RecvPart into{(world.rank() + 2) % 3, in->data, static_cast<std::size_t>(in->bytes()), in->device};
      world.exchange({&out, 1}, {&into, 1}, {.verb = "rotate", .step = step});
      add(in, sum);
      copy(in, value);
    }
    const Tensor result = to_device(sum, Device{});  // 20 turns: six or seven visits of each rank's number
    const float expected = static_cast<float>(6 * (0 + 1 + 2) + (world.rank() + 2) % 3 + (world.rank() + 1) % 3);
    EXPECT_EQ(result.ptr<float>()[0], expected);
    EXPECT_EQ(result.ptr<float>()[199999], expected);
  });
}

Tensor random_of(int rank, std::int64_t count) {
  const DeviceScope host(Device{});
  Tensor tensor(DType::kF32, Shape{count});
  for (std::int64_t i = 0; i < count; ++i) {
    tensor.ptr<float>()[i] = philox_normal(7, static_cast<std::uint64_t>(rank), static_cast<std::uint64_t>(i));
  }
  return tensor;
}

// The stand-in adds from the highest rank down, so its sums show.
TEST(Nccl, SumsOfItsOwnAreUsedWhereOrderDoesNotMatter) {
  Tensor down = random_of(3, 6000);
  for (const int rank : {2, 1, 0}) add(random_of(rank, 6000), down);
  run_nccl_ranks(4, {.timeout_s = 60, .ordered_sums = false}, [&](Communicator& world) {
    const Tensor data = to_device(random_of(world.rank(), 6000), current_device());
    Tensor own(DType::kF32, Shape{1500});
    world.reduce_scatter_sum(data, std::array<std::int64_t, 4>{1500, 1500, 1500, 1500}, own, {.verb = "reduce_scatter"});
    world.all_reduce_sum(data, {.verb = "all_reduce"});
    const Tensor all = to_device(data, Device{}), part = to_device(own, Device{});
    EXPECT_EQ(std::memcmp(all.ptr<char>(), down.ptr<char>(), 6000 * sizeof(float)), 0);
    EXPECT_EQ(std::memcmp(part.ptr<char>(), down.ptr<float>() + 1500 * world.rank(), 1500 * sizeof(float)), 0);
  });
}

// NCCL's own collectives are counted and traced as a ring would move them, and are still NCCL's.
TEST(Nccl, CollectivesOfItsOwnAreCounted) {
  Tensor down = random_of(3, 6000);
  for (const int rank : {2, 1, 0}) add(random_of(rank, 6000), down);
  run_nccl_ranks(4, {.timeout_s = 60, .ordered_sums = false}, [&](Communicator& world) {
    const auto counter = std::make_shared<ByteCounter>();
    const auto trace = std::make_shared<Trace>(world.rank());
    const std::array<int, 4> everyone{0, 1, 2, 3};
    const auto job = counted(traced(world.split(everyone, "job"), trace), counter);
    const Tensor data = to_device(random_of(world.rank(), 6000), current_device());
    const std::array<std::int64_t, 4> even{1500, 1500, 1500, 1500}, uneven{1500, 1499, 1501, 1500};
    Tensor own(DType::kF32, Shape{1500});
    job->reduce_scatter_sum(data, even, own, {.verb = "reduce_scatter"});
    job->all_reduce_sum(data, {.verb = "all_reduce"});
    job->all_gather(data, even, {.verb = "gather"});
    job->all_gather(data, uneven, {.verb = "exchanges"});
    const auto counts = counter->by_verb();
    EXPECT_EQ(counts.at("reduce_scatter").received, 18000);
    EXPECT_EQ(counts.at("all_reduce").sent, 36000);
    EXPECT_EQ(counts.at("gather").received, 18000);
    EXPECT_EQ(counts.at("exchanges").sent, 3 * 4 * uneven[static_cast<std::size_t>(world.rank())]);
    for (const char* verb : {"reduce_scatter", "all_reduce", "gather", "exchanges"}) EXPECT_EQ(counts.at(verb).operations, 1);
    EXPECT_THAT(trace->json_events(), AllOf(HasSubstr("\"all_reduce\""), HasSubstr("\"received\":36000")));
    const Tensor part = to_device(own, Device{});
    EXPECT_EQ(std::memcmp(part.ptr<char>(), down.ptr<float>() + 1500 * world.rank(), 1500 * sizeof(float)), 0);
  });
}

TEST(Nccl, GathersThroughSymmetricMemory) {
  const NcclOptions options{.timeout_s = 60, .tuning = {.zero_cta = true, .symmetric_bytes = 10000, .register_buffers = true}};
  run_nccl_ranks(2, options, [](Communicator& world) {
    for (const std::int64_t count : {1000, 5000}) {  // the second is larger than the buffer
      Tensor all(DType::kF32, Shape{2 * count});
      copy(random_of(world.rank(), count), all->slice(0, world.rank() * count, count));
      world.all_gather(all, std::array<std::int64_t, 2>{count, count}, {.verb = "gather"});
      if (world.rank() == 0) send(world, 1, all, {.verb = "rotate"});
      if (world.rank() == 1) receive(world, 0, all, {.verb = "rotate"});
      const Tensor got = to_device(all, Device{});
      for (const int rank : {0, 1}) {
        EXPECT_EQ(std::memcmp(got.ptr<float>() + rank * count, random_of(rank, count).ptr<char>(),
                              static_cast<std::size_t>(count) * sizeof(float)),
                  0);
      }
    }
  });
}

TEST(Nccl, BorrowsAFrameworksCommunicator) {
  std::string report;
  const nccl::Api api = nccl::find_nccl(report).value();
  nccl::UniqueId id{};
  api.get_unique_id(&id);
  run_device_ranks(
      2, 60,
      [&](std::unique_ptr<Communicator> control) {
        NcclOptions options{.timeout_s = 60};
        nccl::Config config;
        api.comm_init_rank_config(&options.lent, 2, id, control->rank(), &config);
        return nccl_world(std::move(control), options);
      },
      [](Communicator& world) {
        Tensor data = to_device(random_of(world.rank(), 10), current_device());
        world.all_reduce_sum(data, {.verb = "all_reduce"});
        const Tensor sum = to_device(data, Device{});
        EXPECT_EQ(sum.ptr<float>()[3], random_of(0, 10).ptr<float>()[3] + random_of(1, 10).ptr<float>()[3]);
      });
  const Outcome other_ranks = failure_of([&] {
    run_device_ranks(
        2, 60,
        [&](std::unique_ptr<Communicator> control) {
          NcclOptions options{.timeout_s = 60};
          nccl::Config config;
          nccl::UniqueId own{};
          api.get_unique_id(&own);
          api.comm_init_rank_config(&options.lent, 1, own, 0, &config);
          return nccl_world(std::move(control), options);
        },
        [](Communicator&) {});
  });
  EXPECT_THAT(other_ranks.message, AllOf(HasSubstr("rank 0 of 1"), HasSubstr("lend one of the same ranks")));
}

// The framework's communicator serves the framework after a job that ended well and after one that failed; groups of ranks are
// made by splitting it, and those are ours to end.
TEST(Nccl, LentCommunicatorsAreNeverEnded) {
  std::string report;
  const nccl::Api api = nccl::find_nccl(report).value();
  for (const bool fails : {false, true}) {
    nccl::UniqueId id{};
    api.get_unique_id(&id);
    std::array<nccl::Comm, 2> lent{};
    const auto job = [&] {
      run_device_ranks(
          2, 60,
          [&](std::unique_ptr<Communicator> control) {
            const int rank = control->rank();
            nccl::Config config;
            api.comm_init_rank_config(&lent[static_cast<std::size_t>(rank)], 2, id, rank, &config);
            return nccl_world(std::move(control), {.timeout_s = 60, .lent = lent[static_cast<std::size_t>(rank)]});
          },
          [&](Communicator& world) {
            const std::array<int, 2> both{0, 1};
            const auto part = world.partition(both, "part");
            const Tensor data = to_device(random_of(world.rank(), 10), current_device());
            part->all_reduce_sum(data, {.verb = "all_reduce"});
            current_stream().synchronize();
            world.barrier({});
            if (fails && world.rank() == 1) fail(ErrorCode::kSystem, "no space left");
            world.barrier({});
          });
    };
    if (fails)
      EXPECT_THAT(failure_of(job).message, HasSubstr("no space left"));
    else
      job();
    for (const nccl::Comm comm : lent) {
      nccl::Result state = nccl::kInternalError;
      EXPECT_EQ(api.comm_get_async_error(comm, &state), nccl::kSuccess);
      EXPECT_EQ(state, nccl::kSuccess) << "fails: " << fails;
      EXPECT_EQ(api.comm_destroy(comm), nccl::kSuccess);
    }
  }
}

// Two ranks have a group of this name already when four are cut into such groups.
TEST(Nccl, PartsOfOneGroupAreMadeByAllItsRanks) {
  run_nccl_ranks(4, {.timeout_s = 20}, [](Communicator& world) {
    const std::array<int, 2> first{0, 1};
    std::unique_ptr<Communicator> pair;
    if (world.rank() < 2) pair = world.split(first, "pair")->partition(first, "sequence");
    const int begin = world.rank() / 2 * 2;
    const auto part = world.partition(std::array<int, 2>{begin, begin + 1}, "sequence");
    const Tensor data = to_device(random_of(world.rank(), 10), current_device());
    part->all_reduce_sum(data, {.verb = "all_reduce"});
    const Tensor sum = to_device(data, Device{});
    EXPECT_EQ(sum.ptr<float>()[3], random_of(begin, 10).ptr<float>()[3] + random_of(begin + 1, 10).ptr<float>()[3]);
  });
}

TEST(Nccl, IdThroughAFile) {
  const std::string path = testing::TempDir() + "nccl_id";
  std::filesystem::remove(path);
  const NcclOptions options{.timeout_s = 60, .id_file = path};
  run_nccl_ranks(3, options, collective_cases()[0].run);
  EXPECT_FALSE(std::filesystem::exists(path));
  std::ofstream(path) << std::string(128, 'x');  // of a job that was killed
  const Outcome outcome = failure_of([&] { run_nccl_ranks(2, options, [](Communicator&) {}); });
  EXPECT_THAT(outcome.message, AllOf(HasSubstr(path), HasSubstr("exists")));
  std::filesystem::remove(path);
}

TEST(Nccl, MemoryInTheWrongPlaceIsRefused) {
  const auto refusal = [](Communicator& group, std::span<const SendPart> sends, std::span<const RecvPart> receives) {
    try {
      group.exchange(sends, receives, {.verb = "gather"});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  run_nccl_ranks(2, {.timeout_s = 60}, [&](Communicator& world) {
    const Tensor data(DType::kF32, Shape{4});
    float host[4] = {};
    const SendPart send{1 - world.rank(), data->data, 16, data->device};
    const RecvPart receive{1 - world.rank(), host, 16};
    EXPECT_THAT(refusal(world, {&send, 1}, {&receive, 1}), HasSubstr("in one exchange"));
  });
  run_device_ranks(
      2, 60, [](auto control) { return control; },
      [&](Communicator& threads) {
        const Tensor data(DType::kF32, Shape{4});
        const SendPart send{1 - threads.rank(), data->data, 16, data->device};
        EXPECT_THAT(refusal(threads, {&send, 1}, {}), AllOf(HasSubstr("cuda:"), HasSubstr("nccl_world, or staged")));
      });
}

}  // namespace
}  // namespace dattn::test
