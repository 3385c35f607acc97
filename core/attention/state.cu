// States on a CUDA device (core/attention/state.h): one warp a row (b, s, h), the arithmetic of core/attention/state.cpp.
// Sums have a fixed order, so results repeat bit by bit.
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/device/cuda/language.h"
#include "core/device/cuda/runtime.h"

namespace dattn::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // rows a block
constexpr int kThreads = kWarp * kWarps;

template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

// A tensor [B, S, H, V].
template <class T>
struct Rows {
  T* data;
  std::int64_t b, s, h, d;  // strides

  explicit Rows(const TensorView& view)
      : data(view.ptr<T>()), b(view.stride(0)), s(view.stride(1)), h(view.stride(2)), d(view.stride(3)) {}
  __device__ T* row(std::int64_t i_b, std::int64_t i_s, std::int64_t i_h) const { return data + i_b * b + i_s * s + i_h * h; }
};

// A tensor [B, H, S].
template <class T>
struct Scalars {
  T* data;
  std::int64_t b, h, s;

  explicit Scalars(const TensorView& view) : data(view.ptr<T>()), b(view.stride(0)), h(view.stride(1)), s(view.stride(2)) {}
  __device__ T& at(std::int64_t i_b, std::int64_t i_s, std::int64_t i_h) const { return data[i_b * b + i_h * h + i_s * s]; }
};

struct Counts {
  std::int64_t rows, seq, heads, dim;
};

Counts counts_of(const TensorView& out) {
  return {out.size(0) * out.size(1) * out.size(2), out.size(1), out.size(2), out.size(3)};
}

// body(b, s, h, dim, lane) for every row; s is the fastest, as in lse.
template <class Body>
__global__ void DATTN_LAUNCH_BOUNDS(kThreads, 1) each_row(Counts counts, Body body) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= counts.rows) return;
  const std::int64_t rest = row / counts.seq;
  body(rest / counts.heads, row % counts.seq, rest % counts.heads, counts.dim, static_cast<int>(threadIdx.x % kWarp));
}

template <class Body>
void for_rows(const TensorView& out, Body body, NativeStream stream) {
  const Counts counts = counts_of(out);
  launch(each_row<Body>, dim3(static_cast<unsigned>((counts.rows + kWarps - 1) / kWarps)), dim3(kThreads), 0,
         static_cast<cudaStream_t>(stream), counts, body);
}

template <class T>
struct Clear {
  Rows<T> out;
  Scalars<T> lse;

  __device__ void operator()(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t dim, int lane) const {
    T* const to = out.row(b, s, h);
    for (std::int64_t d = lane; d < dim; d += kWarp) to[d * out.d] = 0;
    if (lane == 0) lse.at(b, s, h) = kNothing<T>;
  }
};

template <class T>
struct Merge {
  Rows<T> out;
  Scalars<T> lse;
  Rows<T> other_out;
  Scalars<T> other_lse;

  __device__ void operator()(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t dim, int lane) const {
    const T mine = lse.at(b, s, h), other = other_lse.at(b, s, h);
    if (other == kNothing<T>) return;
    const T top = mine > other ? mine : other;
    const T mine_weight = mine == kNothing<T> ? T(0) : std::exp(mine - top);
    const T other_weight = std::exp(other - top);
    const T sum = mine_weight + other_weight;
    const T keep = mine_weight / sum, take = other_weight / sum;
    T* const to = out.row(b, s, h);
    const T* const from = other_out.row(b, s, h);
    for (std::int64_t d = lane; d < dim; d += kWarp) to[d * out.d] = keep * to[d * out.d] + take * from[d * other_out.d];
    __syncwarp();  // all lanes have read lse
    if (lane == 0) lse.at(b, s, h) = top + std::log(sum);
  }
};

template <class T>
struct MergeSink {
  Rows<T> out;
  Scalars<T> lse;
  const float* sink;
  std::int64_t sink_stride;

  __device__ void operator()(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t dim, int lane) const {
    const T row = lse.at(b, s, h), logit = sink[h * sink_stride];
    if (logit == kNothing<T>) return;
    const T top = row > logit ? row : logit;
    const T both = top + std::log(std::exp(row - top) + std::exp(logit - top));
    const T keep = std::exp(row - both);
    T* const to = out.row(b, s, h);
    for (std::int64_t d = lane; d < dim; d += kWarp) to[d * out.d] *= keep;
    __syncwarp();  // all lanes have read lse
    if (lane == 0) lse.at(b, s, h) = both;
  }
};

template <class Grad, class Out, class Delta>
struct DeltaOf {
  Rows<Grad> dout;
  Rows<Out> out;
  Scalars<Delta> delta;

  __device__ void operator()(std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t dim, int lane) const {
    const Grad* const g = dout.row(b, s, h);
    const Out* const o = out.row(b, s, h);
    Delta sum = 0;
    for (std::int64_t d = lane; d < dim; d += kWarp)
      sum += static_cast<Delta>(o[d * out.d]) * static_cast<Delta>(g[d * dout.d]);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) delta.at(b, s, h) = sum;
  }
};

// One block a head: every thread sums its rows in order, then halves are added.
template <class T>
__global__ void DATTN_LAUNCH_BOUNDS(kThreads, 1)
    sink_gradient(Scalars<T> lse, Scalars<T> delta, const float* sink, std::int64_t sink_stride, T* dsink,
                  std::int64_t dsink_stride, std::int64_t batch, std::int64_t seq) {
  DATTN_SHARED_MEMORY(memory);
  auto* const sums = reinterpret_cast<double*>(memory);
  const std::int64_t h = blockIdx.x;
  const double logit = sink[h * sink_stride];
  double sum = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t s = threadIdx.x; s < seq; s += kThreads)
      sum += std::exp(logit - static_cast<double>(lse.at(b, s, h))) * static_cast<double>(delta.at(b, s, h));
  }
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dsink[h * dsink_stride] -= static_cast<T>(sums[0]);
}

template <class F>
void for_accumulator(DType type, const F& f) {
  if (type == DType::kF64)
    f(double{});
  else
    f(float{});
}

}  // namespace

void clear_state(const TensorView& out, const TensorView& lse, NativeStream stream) {
  for_accumulator(out.dtype, [&]<class T>(T) { for_rows(out, Clear<T>{Rows<T>(out), Scalars<T>(lse)}, stream); });
}

void merge_state(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse,
                 NativeStream stream) {
  for_accumulator(out.dtype, [&]<class T>(T) {
    for_rows(out, Merge<T>{Rows<T>(out), Scalars<T>(lse), Rows<T>(other_out), Scalars<T>(other_lse)}, stream);
  });
}

void merge_sink(const TensorView& out, const TensorView& lse, const TensorView& sink, NativeStream stream) {
  for_accumulator(out.dtype, [&]<class T>(T) {
    for_rows(out, MergeSink<T>{Rows<T>(out), Scalars<T>(lse), sink.ptr<float>(), sink.stride(0)}, stream);
  });
}

void add_sink_gradient(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink,
                       NativeStream stream) {
  for_accumulator(lse.dtype, [&]<class T>(T) {
    launch(sink_gradient<T>, dim3(static_cast<unsigned>(lse.size(1))), dim3(kThreads), kThreads * sizeof(double),
           static_cast<cudaStream_t>(stream), Scalars<T>(lse), Scalars<T>(delta), sink.ptr<float>(), sink.stride(0),
           dsink.ptr<T>(), dsink.stride(0), lse.size(0), lse.size(2));
  });
}

void attention_delta(const TensorView& dout, const TensorView& out, const TensorView& delta, NativeStream stream) {
  dispatch_float(dout.dtype, [&]<class Grad>(Grad) {
    dispatch_float(out.dtype, [&]<class Out>(Out) {
      for_accumulator(delta.dtype, [&]<class Delta>(Delta) {
        for_rows(out, DeltaOf<Grad, Out, Delta>{Rows<Grad>(dout), Rows<Out>(out), Scalars<Delta>(delta)}, stream);
      });
    });
  });
}

}  // namespace dattn::cuda
