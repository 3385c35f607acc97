#include "tests/conformance/random_call.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel/strategy.h"

namespace dattn::conformance {
namespace {

constexpr int kNonsensePercent = 40;  // of the calls

constexpr std::int64_t kLongest = 1'000'000'000;
constexpr int kFewRanks = 8;  // of most calls and of all long ones: proofs of more take longer

}  // namespace

RandomCalls::RandomCalls(std::uint64_t seed, const CallLimits& limits) : random_(seed), limits_(limits) {
  Writer any{"auto", {kSequenceAxes.begin(), kSequenceAxes.end()}};
  for (const Strategy& strategy : strategies()) {
    Writer writer{std::string(strategy.name), {}};
    for (const Axis axis : kSequenceAxes) {
      MeshShape mesh;
      mesh.set(axis, 2);
      if (strategy.accepts(*make_problem(mesh, {.seq_q = 4, .seq_kv = 4}, {})).ok) writer.axes.push_back(axis);
    }
    writers_.push_back(writer);
  }
  writers_.push_back(std::move(any));
}

std::int64_t RandomCalls::pick(std::int64_t from, std::int64_t to) {
  return std::uniform_int_distribution<std::int64_t>(from, std::max(from, to))(random_);
}

bool RandomCalls::chance(int percent) { return pick(0, 99) < percent; }

std::int64_t RandomCalls::odd(std::int64_t number, std::int64_t edge) {
  if (!nonsense_ || !chance(kOddPercent)) return number;
  const std::vector<std::int64_t> others{-1,
                                         0,
                                         1,
                                         edge - 1,
                                         edge,
                                         edge + 1,
                                         -edge - 1,
                                         std::int64_t{1} << 31,
                                         kMaxPosition,
                                         kMaxPosition + 1,
                                         kUnbounded - 1,
                                         std::numeric_limits<std::int64_t>::max(),
                                         std::numeric_limits<std::int64_t>::min()};
  return choose(others);
}

double RandomCalls::odd_real(double number) {
  if (!nonsense_ || !chance(kOddPercent)) return number;
  return choose(std::vector<double>{-1, 0, 1, 1e300, std::nan(""), HUGE_VAL, -HUGE_VAL});
}

std::int64_t RandomCalls::length() {
  if (chance(2)) return pick(0, 2);
  if (size_ == Size::kLong) return pick(1, chance(50) ? kLongest : 1'000'000);
  return pick(1, size_ == Size::kMedium ? 6'000 : limits_.seq);
}

RandomCall RandomCalls::next() {
  nonsense_ = limits_.nonsense && chance(kNonsensePercent);
  size_ = !limits_.long_sequences || chance(85) ? Size::kSmall : chance(60) ? Size::kMedium : Size::kLong;
  const Writer writer = choose(writers_);
  RandomCall call;
  AttentionShape& shape = call.shape;
  shape.batch = pick(chance(5) ? 0 : 1, 3);
  shape.seq_q = length();
  shape.seq_kv = chance(70) ? shape.seq_q : length();
  shape.kv_heads = pick(1, 4);
  shape.heads = shape.kv_heads * pick(1, 4);
  shape.dim_qk = pick(1, limits_.dim);
  shape.dim_v = chance(50) ? shape.dim_qk : pick(1, limits_.dim);
  shape.dtype = choose(std::vector{DType::kF32, DType::kBF16, DType::kF16, DType::kF64});
  if (chance(15)) shape.bias = BiasShape{chance(50), chance(50)};
  shape.sink = chance(15);
  call.options = some_options(shape);
  call.options.strategy = writer.strategy;
  call.mesh = some_mesh(writer);
  if (limits_.planner && chance(10)) {
    call.planned = true;
    call.by_time = chance(50);
    if (chance(70)) call.options.strategy = "auto";
  }
  if (!nonsense_) return call;
  // The mask was made for the sizes that make sense.
  shape.batch = odd(shape.batch, 4);
  shape.seq_q = odd(shape.seq_q, kMaxPosition);
  shape.seq_kv = odd(shape.seq_kv, shape.seq_q);
  shape.heads = odd(shape.heads, shape.kv_heads);
  shape.kv_heads = odd(shape.kv_heads, shape.heads);
  shape.dim_qk = odd(shape.dim_qk, 256);
  shape.dim_v = odd(shape.dim_v, 256);
  if (chance(kOddPercent)) shape.dtype = DType::kI32;
  if (chance(kOddPercent)) call.options.strategy = choose(std::vector<std::string>{"", "rings", "halo", "invariant", "AUTO"});
  return call;
}

MeshShape RandomCalls::some_mesh(const Writer& writer) {
  const bool many = size_ == Size::kSmall && chance(12);
  const auto most = static_cast<int>(many ? limits_.ranks : std::min(limits_.ranks, kFewRanks));
  MeshShape mesh;
  const auto widen = [&](Axis axis, int size) {
    mesh.set(axis, size);
    if (mesh.ranks() > most) mesh.set(axis, 1);
  };
  std::vector<Axis> axes = writer.axes;
  std::shuffle(axes.begin(), axes.end(), random_);
  if (chance(20)) widen(Axis::kTensor, static_cast<int>(pick(2, 4)));
  if (chance(8)) widen(Axis::kData, static_cast<int>(pick(2, 3)));
  for (const Axis axis : axes) {
    if (chance(70)) widen(axis, chance(10) ? static_cast<int>(pick(1, most)) : static_cast<int>(pick(1, 8)));
  }
  if (!nonsense_) return mesh;
  for (const Axis axis : kAxes) {
    if (chance(5)) mesh.set(axis, choose(std::vector{-1, 0, 1, 2, 1000, std::numeric_limits<int>::max()}));
  }
  return mesh;
}

AttentionOptions RandomCalls::some_options(const AttentionShape& shape) {
  AttentionOptions options;
  options.mask = some_mask(shape);
  options.layout = choose(std::vector{Layout::kContiguous, Layout::kZigzag, Layout::kStriped, Layout::kBalanced});
  options.determinism = chance(10) ? Determinism::kInvariant : chance(10) ? Determinism::kOff : Determinism::kRepeatable;
  const double usual = 1 / std::sqrt(static_cast<double>(shape.dim_qk));
  if (chance(15)) options.softmax_scale = odd_real(usual * static_cast<double>(pick(3, 12)) / 10);
  if (chance(15)) options.softcap = odd_real(static_cast<double>(pick(5, 40)) / 10);
  if (chance(15)) options.dropout = odd_real(static_cast<double>(pick(0, 9)) / 10);
  options.dropout_seed = static_cast<std::uint64_t>(pick(0, 1000));
  if (!chance(15)) return options;
  const std::int64_t slopes = nonsense_ && chance(kOddPercent) ? pick(0, 2 * shape.heads) : shape.heads;
  for (std::int64_t i = 0; i < slopes; ++i) options.alibi_slopes.push_back(odd_real(static_cast<double>(pick(0, 40)) / 1000));
  return options;
}

}  // namespace dattn::conformance
