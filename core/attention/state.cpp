#include "core/attention/state.h"

#include <cmath>
#include <limits>

#include "core/base/error.h"
#include "core/base/threads.h"
#include "core/device/cuda_module.h"
#include "core/device/stream.h"

namespace dattn {
namespace {

// out [B, S, H, V] and lse [B, H, S] belong together.
void check_state(const TensorView& out, const TensorView& lse) {
  ensure(out.axes() == 4 && lse.axes() == 3 && out.size(0) == lse.size(0) && out.size(1) == lse.size(2) &&
             out.size(2) == lse.size(1),
         "a state has out {} and lse {}; they are [B, S, H, V] and [B, H, S]", out.shape.text(), lse.shape.text());
}

void check_accumulator(const TensorView& view, DType type, const char* what) {
  ensure(view.dtype == type && (type == DType::kF32 || type == DType::kF64),
         "{} has type {} beside a state of type {}; states are fp32 or fp64", what, name_of(view.dtype), name_of(type));
}

// Calls body(b, s, h) for every row, spread over the threads by (b, s).
template <class Body>
void for_each_row(const TensorView& out, const Body& body) {
  const std::int64_t seq = out.size(1), heads = out.size(2), rows = out.size(0) * seq;
  constexpr std::int64_t kRows = 64;  // one task: enough work to be worth handing out
  parallel_for((rows + kRows - 1) / kRows, [&](std::int64_t task) {
    for (std::int64_t row = task * kRows; row < rows && row < (task + 1) * kRows; ++row) {
      for (std::int64_t h = 0; h < heads; ++h) body(row / seq, row % seq, h);
    }
  });
}

template <class T>
void merge_rows(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse) {
  const std::int64_t dim = out.size(3), stride = out.stride(3), other_stride = other_out.stride(3);
  for_each_row(out, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    T& mine = lse.at<T>(b, h, s);
    const T other = other_lse.at<T>(b, h, s);
    constexpr T kNothing = -std::numeric_limits<T>::infinity();
    if (other == kNothing) return;
    const T top = std::max(mine, other);
    const T mine_weight = mine == kNothing ? T(0) : std::exp(mine - top);
    const T other_weight = std::exp(other - top);
    const T sum = mine_weight + other_weight;
    mine = top + std::log(sum);
    T* to = &out.at<T>(b, s, h, 0);
    const T* from = &other_out.at<T>(b, s, h, 0);
    const T keep = mine_weight / sum, take = other_weight / sum;
    for (std::int64_t d = 0; d < dim; ++d) to[d * stride] = keep * to[d * stride] + take * from[d * other_stride];
  });
}

template <class T>
void clear_rows(const TensorView& out, const TensorView& lse) {
  for_each_row(out, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    T* to = &out.at<T>(b, s, h, 0);
    for (std::int64_t d = 0; d < out.size(3); ++d) to[d * out.stride(3)] = 0;
    lse.at<T>(b, h, s) = -std::numeric_limits<T>::infinity();
  });
}

template <class T>
void merge_sink_rows(const TensorView& out, const TensorView& lse, const TensorView& sink) {
  for_each_row(out, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    T& row = lse.at<T>(b, h, s);
    const T logit = sink.at<float>(h);
    if (logit == -std::numeric_limits<T>::infinity()) return;
    const T top = std::max(row, logit);
    const T both = top + std::log(std::exp(row - top) + std::exp(logit - top));
    const T keep = std::exp(row - both);
    T* to = &out.at<T>(b, s, h, 0);
    for (std::int64_t d = 0; d < out.size(3); ++d) to[d * out.stride(3)] *= keep;
    row = both;
  });
}

template <class T>
void add_sink_rows(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink) {
  for (std::int64_t h = 0; h < lse.size(1); ++h) {
    double sum = 0;
    for (std::int64_t b = 0; b < lse.size(0); ++b) {
      for (std::int64_t s = 0; s < lse.size(2); ++s)
        sum += std::exp(static_cast<double>(sink.at<float>(h)) - static_cast<double>(lse.at<T>(b, h, s))) *
               static_cast<double>(delta.at<T>(b, h, s));
    }
    dsink.at<T>(h) -= static_cast<T>(sum);
  }
}

template <class Grad, class Out, class Delta>
void delta_rows(const TensorView& dout, const TensorView& out, const TensorView& delta) {
  const std::int64_t dim = out.size(3), out_stride = out.stride(3), grad_stride = dout.stride(3);
  for_each_row(out, [&](std::int64_t b, std::int64_t s, std::int64_t h) {
    const Out* o = &out.at<Out>(b, s, h, 0);
    const Grad* g = &dout.at<Grad>(b, s, h, 0);
    Delta sum = 0;
    for (std::int64_t d = 0; d < dim; ++d) {
      sum += static_cast<Delta>(o[d * out_stride]) * static_cast<Delta>(g[d * grad_stride]);
    }
    delta.at<Delta>(b, h, s) = sum;
  });
}

}  // namespace

void merge_state(const TensorView& out, const TensorView& lse, const TensorView& other_out, const TensorView& other_lse) {
  check_state(out, lse);
  ensure(out.shape == other_out.shape && lse.shape == other_lse.shape, "states of shapes {} and {} are merged",
         out.shape.text(), other_out.shape.text());
  check_accumulator(lse, out.dtype, "lse");
  check_accumulator(other_out, out.dtype, "the other out");
  check_accumulator(other_lse, out.dtype, "the other lse");
  if (out.elements() == 0) return;
  if (on_cuda({&out, &lse, &other_out, &other_lse}))
    return cuda_module().merge_state(out, lse, other_out, other_lse, current_stream().native());
  if (out.dtype == DType::kF64)
    merge_rows<double>(out, lse, other_out, other_lse);
  else
    merge_rows<float>(out, lse, other_out, other_lse);
}

void clear_state(const TensorView& out, const TensorView& lse) {
  check_state(out, lse);
  check_accumulator(lse, out.dtype, "lse");
  if (out.elements() == 0) return;
  if (on_cuda({&out, &lse})) return cuda_module().clear_state(out, lse, current_stream().native());
  if (out.dtype == DType::kF64)
    clear_rows<double>(out, lse);
  else
    clear_rows<float>(out, lse);
}

void merge_sink(const TensorView& out, const TensorView& lse, const TensorView& sink) {
  check_state(out, lse);
  check_accumulator(lse, out.dtype, "lse");
  ensure(sink.dtype == DType::kF32 && sink.shape == Shape({out.size(2)}), "sink logits {} {} for {} heads", name_of(sink.dtype),
         sink.shape.text(), out.size(2));
  if (out.elements() == 0) return;
  if (on_cuda({&out, &lse, &sink})) return cuda_module().merge_sink(out, lse, sink, current_stream().native());
  if (out.dtype == DType::kF64)
    merge_sink_rows<double>(out, lse, sink);
  else
    merge_sink_rows<float>(out, lse, sink);
}

void add_sink_gradient(const TensorView& lse, const TensorView& delta, const TensorView& sink, const TensorView& dsink) {
  ensure(lse.shape == delta.shape && sink.shape == Shape({lse.size(1)}) && dsink.shape == sink.shape &&
             sink.dtype == DType::kF32 && dsink.dtype == lse.dtype && delta.dtype == lse.dtype,
         "sink gradient of lse {}, delta {}, sink {}, dsink {}", lse.shape.text(), delta.shape.text(), sink.shape.text(),
         dsink.shape.text());
  check_accumulator(lse, lse.dtype, "lse");
  if (on_cuda({&lse, &delta, &sink, &dsink})) {
    return cuda_module().add_sink_gradient(lse, delta, sink, dsink, current_stream().native());
  }
  if (lse.dtype == DType::kF64)
    add_sink_rows<double>(lse, delta, sink, dsink);
  else
    add_sink_rows<float>(lse, delta, sink, dsink);
}

void attention_delta(const TensorView& dout, const TensorView& out, const TensorView& delta) {
  check_state(out, delta);
  ensure(dout.shape == out.shape, "dout has shape {} and out {}", dout.shape.text(), out.shape.text());
  check_accumulator(delta, accumulate_type(dout.dtype), "delta");
  if (out.elements() == 0) return;
  if (on_cuda({&dout, &out, &delta})) return cuda_module().attention_delta(dout, out, delta, current_stream().native());
  dispatch_float(dout.dtype, [&]<class Grad>(Grad) {
    dispatch_float(out.dtype, [&]<class Out>(Out) {
      if (delta.dtype == DType::kF64)
        delta_rows<Grad, Out, double>(dout, out, delta);
      else
        delta_rows<Grad, Out, float>(dout, out, delta);
    });
  });
}

}  // namespace dattn
