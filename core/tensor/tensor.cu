// Copies, sums and zeros of strided tensors on a CUDA device. Axes are put in order of the target's strides and joined where
// both sides allow it, so most calls are one or two axes; one thread moves one unit, up to 16 bytes of the fastest axis.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "core/device/cuda/language.h"
#include "core/device/cuda/runtime.h"

namespace dattn::cuda {
namespace {

constexpr int kThreads = 256;

// What two tensors of one shape have in common: extents, the last axis the fastest, and strides in units.
struct Walk {
  int axes = 0;
  std::array<std::int64_t, kMaxAxes> extents{};
  std::array<std::int64_t, kMaxAxes> from{};
  std::array<std::int64_t, kMaxAxes> to{};

  std::int64_t units() const {
    std::int64_t product = 1;
    for (int axis = 0; axis < axes; ++axis) product *= extents[static_cast<std::size_t>(axis)];
    return product;
  }
};

// The same for a kernel.
struct DeviceWalk {
  std::uint32_t units;
  int axes;
  std::uint32_t extents[kMaxAxes];
  std::int64_t from[kMaxAxes];
  std::int64_t to[kMaxAxes];
};

Walk make_walk(const TensorView& from, const TensorView& to) {
  std::array<int, kMaxAxes> order{};
  int used = 0;
  for (int axis = 0; axis < to.axes(); ++axis) {
    if (to.size(axis) != 1) order[static_cast<std::size_t>(used++)] = axis;
  }
  std::stable_sort(order.begin(), order.begin() + used, [&](int a, int b) { return to.stride(a) > to.stride(b); });
  Walk walk;
  for (int i = 0; i < used; ++i) {
    const int axis = order[static_cast<std::size_t>(i)];
    const auto before = static_cast<std::size_t>(walk.axes - 1);
    const std::int64_t extent = to.size(axis);
    if (walk.axes > 0 && walk.from[before] == from.stride(axis) * extent && walk.to[before] == to.stride(axis) * extent) {
      walk.extents[before] *= extent;
      walk.from[before] = from.stride(axis);
      walk.to[before] = to.stride(axis);
    } else {
      const auto place = static_cast<std::size_t>(walk.axes++);
      walk.extents[place] = extent;
      walk.from[place] = from.stride(axis);
      walk.to[place] = to.stride(axis);
    }
  }
  if (walk.axes == 0) {
    walk.axes = 1;
    walk.extents[0] = walk.from[0] = walk.to[0] = 1;
  }
  return walk;
}

bool dense(const Walk& walk) { return walk.axes == 1 && walk.from[0] == 1 && walk.to[0] == 1; }

// Takes `width` elements of the fastest axis as one unit, where everything is a multiple of it.
bool widen(Walk& walk, std::int64_t width) {
  const auto last = static_cast<std::size_t>(walk.axes - 1);
  if (walk.from[last] != 1 || walk.to[last] != 1 || walk.extents[last] % width != 0) return false;
  for (std::size_t axis = 0; axis < last; ++axis) {
    if (walk.from[axis] % width != 0 || walk.to[axis] % width != 0) return false;
  }
  walk.extents[last] /= width;
  for (std::size_t axis = 0; axis < last; ++axis) {
    walk.from[axis] /= width;
    walk.to[axis] /= width;
  }
  return true;
}

bool aligned(const void* data, std::int64_t bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

template <class Move>
__global__ void DATTN_LAUNCH_BOUNDS(kThreads, 1) move_units(DeviceWalk walk, Move move) {
  std::uint32_t rest = blockIdx.x * kThreads + threadIdx.x;
  if (rest >= walk.units) return;
  std::int64_t from = 0, to = 0;
#pragma unroll
  for (int axis = kMaxAxes - 1; axis > 0; --axis) {
    if (axis >= walk.axes) continue;
    const std::uint32_t outer = rest / walk.extents[axis], index = rest - outer * walk.extents[axis];
    from += index * walk.from[axis];
    to += index * walk.to[axis];
    rest = outer;
  }
  move(from + rest * walk.from[0], to + rest * walk.to[0]);
}

// `move` has pointers `from` and `to` to units. Kernels count in 32 bits: larger walks go in slices of the slowest axis.
template <class Move>
void run(const Walk& walk, Move move, cudaStream_t stream) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  const std::int64_t units = walk.units();
  if (units == 0) return;
  if (units > kMost) {
    const std::int64_t half = walk.extents[0] / 2;
    Walk part = walk;
    part.extents[0] = half;
    run(part, move, stream);
    part.extents[0] = walk.extents[0] - half;
    move.from += half * walk.from[0];
    move.to += half * walk.to[0];
    run(part, move, stream);
    return;
  }
  DeviceWalk on_device{};
  on_device.units = static_cast<std::uint32_t>(units);
  on_device.axes = walk.axes;
  for (std::size_t axis = 0; axis < kMaxAxes; ++axis) {
    on_device.extents[axis] = static_cast<std::uint32_t>(walk.extents[axis]);
    on_device.from[axis] = walk.from[axis];
    on_device.to[axis] = walk.to[axis];
  }
  launch(move_units<Move>, dim3(static_cast<unsigned>((units + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, on_device,
         move);
}

template <class Word>
struct CopyWord {
  const Word* from;
  Word* to;
  __device__ void operator()(std::int64_t f, std::int64_t t) const { to[t] = from[f]; }
};

template <class Word>
struct ZeroWord {
  const Word* from;  // not read
  Word* to;
  __device__ void operator()(std::int64_t /*f*/, std::int64_t t) const { to[t] = Word{}; }
};

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

enum class Into { kReplace, kAdd, kMaximum };

// In fp64 where one side is, else in fp32.
template <class From, class To, Into kInto, int kWidth>
struct Convert {
  const Pack<From, kWidth>* from;
  Pack<To, kWidth>* to;

  __device__ void operator()(std::int64_t f, std::int64_t t) const {
    using Wide = std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
    const Pack<From, kWidth> source = from[f];
    Pack<To, kWidth> target{};
    if constexpr (kInto != Into::kReplace) target = to[t];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Wide value = static_cast<Wide>(source.values[i]);
      if constexpr (kInto == Into::kAdd) value += static_cast<Wide>(target.values[i]);
      if constexpr (kInto == Into::kMaximum) {
        const Wide held = static_cast<Wide>(target.values[i]);
        if (!(value > held) && value == value) value = held;  // a NaN on either side stays
      }
      if constexpr (kIsHalf<To>)
        target.values[i] = To(static_cast<float>(value));
      else
        target.values[i] = static_cast<To>(value);
    }
    to[t] = target;
  }
};

// The largest word, in bytes, that both tensors are made of.
template <template <class> class Move>
void run_words(Walk walk, const TensorView& from, const TensorView& to, cudaStream_t stream) {
  const std::int64_t size = size_of(to.dtype);
  std::int64_t bytes = 16;
  while (bytes > size && !(aligned(from.data, bytes) && aligned(to.data, bytes) && widen(walk, bytes / size))) bytes /= 2;
  const auto go = [&]<class Word>(Word) {
    run(walk, Move<Word>{static_cast<const Word*>(from.data), static_cast<Word*>(to.data)}, stream);
  };
  switch (bytes) {
    case 16: return go(uint4{});
    case 8: return go(uint2{});
    case 4: return go(std::uint32_t{});
    default: return go(std::uint16_t{});
  }
}

template <Into kInto>
void convert(Walk walk, const TensorView& from, const TensorView& to, cudaStream_t stream) {
  constexpr int kWidth = 4;
  const bool wide =
      aligned(from.data, kWidth * size_of(from.dtype)) && aligned(to.data, kWidth * size_of(to.dtype)) && widen(walk, kWidth);
  dispatch_float(from.dtype, [&]<class From>(From) {
    dispatch_float(to.dtype, [&]<class To>(To) {
      const auto go = [&]<int kUnit>(std::integral_constant<int, kUnit>) {
        run(walk,
            Convert<From, To, kInto, kUnit>{static_cast<const Pack<From, kUnit>*>(from.data),
                                            static_cast<Pack<To, kUnit>*>(to.data)},
            stream);
      };
      if (wide)
        go(std::integral_constant<int, kWidth>{});
      else
        go(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace

void fill_zero(const TensorView& view, NativeStream stream) {
  if (view.empty() || only_host()) return;
  const auto native = static_cast<cudaStream_t>(stream);
  const Walk walk = make_walk(view, view);
  if (dense(walk))
    check(cudaMemsetAsync(view.data, 0, static_cast<std::size_t>(view.bytes()), native), "cudaMemsetAsync");
  else
    run_words<ZeroWord>(walk, view, view, native);
}

void copy(const TensorView& from, const TensorView& to, NativeStream stream) {
  if (to.empty() || only_host()) return;
  const auto native = static_cast<cudaStream_t>(stream);
  const Walk walk = make_walk(from, to);
  if (from.dtype != to.dtype)
    convert<Into::kReplace>(walk, from, to, native);
  else if (dense(walk))
    check(cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(to.bytes()), cudaMemcpyDefault, native),
          "cudaMemcpyAsync");
  else
    run_words<CopyWord>(walk, from, to, native);
}

void add(const TensorView& from, const TensorView& to, NativeStream stream) {
  if (!to.empty()) convert<Into::kAdd>(make_walk(from, to), from, to, static_cast<cudaStream_t>(stream));
}

void take_maximum(const TensorView& from, const TensorView& to, NativeStream stream) {
  if (!to.empty()) convert<Into::kMaximum>(make_walk(from, to), from, to, static_cast<cudaStream_t>(stream));
}

}  // namespace dattn::cuda
