#include "tests/parallel/comm/cases.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "core/base/philox.h"
#include "parallel/comm/decorators.h"

namespace dattn::test {
namespace {

constexpr DType kFloats[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};
const OpLabel kLabel{.verb = "test", .layer = 3, .step = 7};

Tensor host_tensor(DType dtype, const Shape& shape) {
  const DeviceScope scope(Device{});
  return {dtype, shape};
}
Tensor here(const TensorView& host) { return to_device(host, current_device()); }  // where the case runs
Tensor home(const TensorView& view) { return to_device(view, Device{}); }

// A row of equal numbers, and whether one is.
Tensor filled(std::size_t count, int value) {
  Tensor row = host_tensor(DType::kI32, Shape{static_cast<std::int64_t>(count)});
  std::fill_n(row.ptr<int>(), count, value);
  return here(row);
}
void check_filled(const TensorView& view, int value, std::string_view what) {
  const Tensor row = home(view);
  for (std::int64_t i = 0; i < view.elements(); ++i) {
    ensure(row.ptr<int>()[i] == value, "{}: {} at {}, not {}", what, row.ptr<int>()[i], i, value);
  }
}
SendPart send_to(int peer, const TensorView& view) {
  return {peer, view.data, static_cast<std::size_t>(view.bytes()), view.device};
}
RecvPart receive_from(int peer, const TensorView& view) {
  return {peer, view.data, static_cast<std::size_t>(view.bytes()), view.device};
}

double value_at(const TensorView& view, std::int64_t i) {
  return dispatch_float(view.dtype, [&](auto zero) { return static_cast<double>(view.ptr<decltype(zero)>()[i]); });
}

// Numbers whose sum depends on the order of additions, known for every rank.
Tensor numbers_of(int rank, DType dtype, std::int64_t count) {
  Tensor tensor = host_tensor(DType::kF32, Shape{count});
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::uint64_t>(i);
    const float scale = philox_uniform(5, static_cast<std::uint64_t>(rank), at) < 0.5f ? 1e-3f : 1e4f;
    tensor.ptr<float>()[i] = scale * philox_normal(7, static_cast<std::uint64_t>(rank), at);
  }
  return to_dtype(tensor, dtype);
}

// The sum over the ranks as the interface promises it: in rank order, in the accumulator type, rounded once.
Tensor expected_sum(int ranks, DType dtype, std::int64_t count) {
  Tensor sum = to_dtype(numbers_of(0, dtype, count), accumulate_type(dtype));
  for (int r = 1; r < ranks; ++r) add(numbers_of(r, dtype, count), sum);
  return to_dtype(sum, dtype);
}

void check_bits(const TensorView& result, const TensorView& want, const char* what) {
  const Tensor on_host = home(result);
  const TensorView& got = on_host;
  const auto bytes = static_cast<std::size_t>(want.bytes());
  if (bytes == 0 || std::memcmp(got.data, want.data, bytes) == 0) return;
  for (std::int64_t i = 0; i < want.elements(); ++i) {
    ensure(value_at(got, i) == value_at(want, i), "{} {}: element {} of {} is {}, not {}", what, name_of(want.dtype), i,
           want.elements(), value_at(got, i), value_at(want, i));
  }
}

void all_reduce_sums_in_rank_order(Communicator& world) {
  for (const DType dtype : kFloats) {
    for (const std::int64_t count : {0, 1, 7, 1000, 9001}) {
      const Tensor data = here(numbers_of(world.rank(), dtype, count));
      world.all_reduce_sum(data, kLabel);
      check_bits(data, expected_sum(world.size(), dtype, count), "all_reduce_sum");
    }
  }
}

void all_reduce_takes_maxima(Communicator& world) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : kFloats) {
    for (const std::int64_t count : {1, 5003}) {
      for (const int from : {0, world.size() - 1}) {  // whose last number is none
        Tensor numbers = host_tensor(DType::kF64, Shape{count});
        for (std::int64_t i = 0; i < count; ++i) {
          numbers.ptr<double>()[i] = static_cast<double>((i + world.rank()) % world.size()) - 100;
        }
        numbers.ptr<double>()[count - 1] = world.rank() == from ? kNaN : 1;
        Tensor data = here(to_dtype(numbers, dtype));
        world.all_reduce_max(data, kLabel);
        data = home(data);
        for (std::int64_t i = 0; i + 1 < count; ++i) {
          ensure(value_at(data, i) == world.size() - 101, "max {} at {}", value_at(data, i), i);
        }
        ensure(std::isnan(value_at(data, count - 1)), "a NaN of rank {} must reach all", from);
      }
    }
  }
}

// Uneven counts, some of them zero.
std::vector<std::int64_t> uneven_counts(int ranks, int salt) {
  std::vector<std::int64_t> counts;
  for (int r = 0; r < ranks; ++r) counts.push_back((r + salt) % 3 == 0 ? 0 : 3 * r * salt + 1);
  return counts;
}

void all_gather_of_uneven_slots(Communicator& world) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI32}) {
    for (const int salt : {0, 1, 2, 700}) {
      const auto counts = uneven_counts(world.size(), salt);
      const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
      Tensor all = host_tensor(dtype, Shape{total}), want = host_tensor(dtype, Shape{total});
      auto* bytes = want.ptr<unsigned char>();
      for (std::int64_t i = 0; i < want->bytes(); ++i) bytes[i] = static_cast<unsigned char>(i * 31 + salt);
      std::int64_t begin = 0;
      for (int r = 0; r < world.rank(); ++r) begin += counts[static_cast<std::size_t>(r)];
      const std::int64_t own = counts[static_cast<std::size_t>(world.rank())];
      const std::int64_t width = size_of(dtype);
      if (own > 0) std::memcpy(all.ptr<char>() + begin * width, bytes + begin * width, static_cast<std::size_t>(own * width));
      all = here(all);
      world.all_gather(all, counts, kLabel);
      all = home(all);
      ensure(total == 0 || std::memcmp(all.ptr<char>(), bytes, static_cast<std::size_t>(want->bytes())) == 0,
             "all_gather of {} with salt {} differs", name_of(dtype), salt);
    }
  }
}

void reduce_scatter_of_uneven_slots(Communicator& world) {
  for (const DType dtype : kFloats) {
    for (const int salt : {0, 1, 2, 700}) {
      const auto counts = uneven_counts(world.size(), salt);
      const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
      const Tensor all = here(numbers_of(world.rank(), dtype, total));
      std::int64_t begin = 0;
      for (int r = 0; r < world.rank(); ++r) begin += counts[static_cast<std::size_t>(r)];
      const std::int64_t own_count = counts[static_cast<std::size_t>(world.rank())];
      Tensor own(dtype, Shape{own_count});
      world.reduce_scatter_sum(all, counts, own, kLabel);
      const Tensor sum = expected_sum(world.size(), dtype, total);
      check_bits(own, sum->slice(0, begin, own_count), "reduce_scatter_sum");
    }
  }
}

void broadcast_from_every_root(Communicator& world) {
  for (int root = 0; root < world.size(); ++root) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{1000}, std::size_t{100003}}) {
      std::vector<std::byte> data(bytes);
      if (world.rank() == root) {
        for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<std::byte>(i * 13 + static_cast<std::size_t>(root));
      }
      world.broadcast(data, root, kLabel);
      for (std::size_t i = 0; i < bytes; ++i) {
        ensure(data[i] == static_cast<std::byte>(i * 13 + static_cast<std::size_t>(root)), "byte {} of root {}", i, root);
      }
    }
  }
}

void strings_from_every_rank(Communicator& world) {
  const auto text_of = [](int r) { return std::string(static_cast<std::size_t>(r % 3) * 5000, static_cast<char>('a' + r)); };
  const auto all = world.gather_strings(text_of(world.rank()), kLabel);
  for (int r = 0; r < world.size(); ++r) ensure(all[static_cast<std::size_t>(r)] == text_of(r), "string of rank {} differs", r);
}

// The ring: several transfers under way at once, waited for in another order than they were started.
void transfers_match_in_the_order_of_their_start(Communicator& world) {
  constexpr int kRounds = 8;
  const int next = (world.rank() + 1) % world.size(), previous = (world.rank() + world.size() - 1) % world.size();
  std::vector<Tensor> out, in;
  std::vector<Communicator::Ticket> tickets;
  for (int round = 0; round < kRounds; ++round) {
    const auto count = static_cast<std::size_t>(1 + round * 5000);
    out.push_back(filled(count, world.rank() * 100 + round));
    in.push_back(filled(count, -1));
    const SendPart send = send_to(next, out.back());
    const RecvPart receive = receive_from(previous, in.back());
    tickets.push_back(world.start({&send, 1}, {&receive, 1}, kLabel));
  }
  for (int round = kRounds - 1; round >= 0; --round) {
    const auto i = static_cast<std::size_t>(round);
    world.wait(tickets[i]);
    check_filled(in[i], previous * 100 + round, "a round brought");
  }
}

void all_to_all_of_uneven_parts(Communicator& world) {
  const auto count = [&](int from, int to) { return static_cast<std::size_t>((from * 7 + to * 3) % 5 * 1000); };  // some zero
  std::vector<Tensor> out, in;
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  const auto me = world.rank();
  for (int r = 0; r < world.size(); ++r) {
    out.push_back(filled(count(me, r), me * 1000 + r));
    in.push_back(filled(count(r, me), -1));
    sends.push_back(send_to(r, out.back()));
    receives.push_back(receive_from(r, in.back()));
  }
  world.exchange(sends, receives, kLabel);
  for (int r = 0; r < world.size(); ++r) check_filled(in[static_cast<std::size_t>(r)], r * 1000 + me, "all to all");
}

// Two groups that share ranks, with transfers of both under way, started in another order on odd ranks.
void groups_do_not_mix(Communicator& world) {
  std::vector<int> all(static_cast<std::size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  const auto red = world.split(all, "red"), blue = world.split(all, "blue"), again = world.split(all, "red");
  const int next = (world.rank() + 1) % world.size(), previous = (world.rank() + world.size() - 1) % world.size();
  const Tensor red_out = filled(1, 10 + world.rank()), blue_out = filled(1, 20 + world.rank()),
               last_out = filled(1, 30 + world.rank());
  const Tensor red_in = filled(1, 0), blue_in = filled(1, 0), last_in = filled(1, 0);
  const auto start = [&](Communicator& group, const TensorView& out, const TensorView& in) {
    const SendPart send = send_to(next, out);
    const RecvPart receive = receive_from(previous, in);
    return group.start({&send, 1}, {&receive, 1}, kLabel);
  };
  Communicator::Ticket red_ticket = 0, blue_ticket = 0;
  if (world.rank() % 2 == 0) red_ticket = start(*red, red_out, red_in);
  blue_ticket = start(*blue, blue_out, blue_in);
  if (world.rank() % 2 == 1) red_ticket = start(*red, red_out, red_in);
  const Communicator::Ticket last_ticket = start(*again, last_out, last_in);  // the same group as red: comes after it
  again->wait(last_ticket);
  blue->wait(blue_ticket);
  red->wait(red_ticket);
  check_filled(red_in, 10 + previous, "red");
  check_filled(blue_in, 20 + previous, "blue");
  check_filled(last_in, 30 + previous, "red again");
}

void splits_number_their_own_ranks(Communicator& world) {
  std::vector<int> mine;
  for (int r = world.rank() % 2; r < world.size(); r += 2) mine.push_back(r);
  const auto half = world.split(mine, "half");
  ensure(half->size() == static_cast<int>(mine.size()) && mine[static_cast<std::size_t>(half->rank())] == world.rank(),
         "places");
  const auto check_sum = [&](Communicator& group) {
    Tensor sum = host_tensor(DType::kF64, Shape{1});
    sum.ptr<double>()[0] = world.rank();
    sum = here(sum);
    group.all_reduce_sum(sum, kLabel);
    sum = home(sum);
    ensure(sum.ptr<double>()[0] == std::accumulate(mine.begin(), mine.end(), 0.0), "the sum over '{}' is {}", group.name(),
           sum.ptr<double>()[0]);
  };
  check_sum(*half);
  if (world.size() % 2 == 0) check_sum(*world.partition(mine, "parity"));
  const int self = half->rank();
  ensure(half->split({&self, 1}, "alone")->size() == 1, "a group of one");
}

void barrier_holds_everybody(Communicator& world) {
  for (int i = 0; i < 3; ++i) world.barrier(kLabel);
}

void long_messages(Communicator& world) {
  const std::size_t count = std::size_t{9} << 20;  // 72 MiB of doubles: longer than a piece of MPI's
  if (world.size() != 2) return;
  Tensor data = host_tensor(DType::kF64, Shape{static_cast<std::int64_t>(count)});
  if (world.rank() == 0) std::iota(data.ptr<double>(), data.ptr<double>() + count, 1.0);
  data = here(data);
  const SendPart send = send_to(1, data);
  const RecvPart receive = receive_from(0, data);
  if (world.rank() == 0) world.exchange({&send, 1}, {}, kLabel);
  if (world.rank() == 1) world.exchange({}, {&receive, 1}, kLabel);
  data = home(data);
  const double* values = data.ptr<double>();
  const auto last = static_cast<double>(count);
  ensure(values[0] == 1.0 && values[count / 2] == static_cast<double>(count / 2 + 1) && values[count - 1] == last,
         "a message in pieces arrived as {} .. {}", values[0], values[count - 1]);
}

void decorated_groups_count_what_travels(Communicator& world) {
  struct Borrowed final : Communicator {  // lends the world to the decorators
    explicit Borrowed(Communicator& c) : inner(c) {}
    int rank() const override { return inner.rank(); }
    int size() const override { return inner.size(); }
    std::string_view name() const override { return inner.name(); }
    Ticket start(std::span<const SendPart> s, std::span<const RecvPart> r, const OpLabel& l) override {
      return inner.start(s, r, l);
    }
    void wait(Ticket ticket) override { inner.wait(ticket); }
    std::unique_ptr<Communicator> split(std::span<const int> r, std::string_view n) override { return inner.split(r, n); }
    using Communicator::abort;
    void abort(const std::string& reason) noexcept override { inner.abort(reason); }
    Communicator& inner;
  };
  const auto counter = std::make_shared<ByteCounter>();
  const auto group = counted(std::make_unique<Borrowed>(world), counter);
  const std::int64_t ranks = world.size(), elements = ranks * 5000;
  Tensor data(DType::kF32, Shape{elements});
  group->all_reduce_sum(data, {.verb = "reduce"});
  std::vector<int> all(static_cast<std::size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  group->split(all, "axis")
      ->all_gather(data, std::vector<std::int64_t>(static_cast<std::size_t>(ranks), 5000), {.verb = "gather"});
  if (ranks == 1) return ensure(counter->total().received == 0, "one rank sends nothing");
  const auto counts = counter->by_verb();
  const std::int64_t round = (ranks - 1) * 5000 * 4;
  ensure(counts.at("reduce").received == 2 * round && counts.at("reduce").sent == 2 * round, "reduce: {} bytes, not {}",
         counts.at("reduce").received, 2 * round);
  ensure(counts.at("gather").received == round && counts.at("gather").operations == 1, "gather: {} bytes, not {}",
         counts.at("gather").received, round);
}

}  // namespace

const std::vector<Case>& collective_cases() {
  static const std::vector<Case> cases{
      {"AllReduceSum", all_reduce_sums_in_rank_order},
      {"AllReduceMax", all_reduce_takes_maxima},
      {"AllGather", all_gather_of_uneven_slots},
      {"ReduceScatter", reduce_scatter_of_uneven_slots},
      {"Broadcast", broadcast_from_every_root},
      {"GatherStrings", strings_from_every_rank},
      {"Order", transfers_match_in_the_order_of_their_start},
      {"AllToAll", all_to_all_of_uneven_parts},
      {"Groups", groups_do_not_mix},
      {"Splits", splits_number_their_own_ranks},
      {"Barrier", barrier_holds_everybody},
      {"LongMessage", long_messages},
      {"Counted", decorated_groups_count_what_travels},
  };
  return cases;
}

// Ranks that spin would take what processors there are, a second of one at least, however many ranks share them.
void waiting_ranks_sleep(Communicator& world) {
  constexpr double kLate = 1.0;
  const auto processor_s = [] {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  world.barrier(kLabel);
  const double before = processor_s();
  if (world.rank() == world.size() - 1) std::this_thread::sleep_for(std::chrono::duration<double>(kLate));
  world.barrier(kLabel);
  double used = processor_s() - before;
  world.all_reduce_sum(TensorView(&used, DType::kF64, {1}), kLabel);
  ensure(used < 0.3 * kLate, "{} ranks that waited {} s for one used {} s of the processors", world.size() - 1, kLate, used);
}

}  // namespace dattn::test
