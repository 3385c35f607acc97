#include "core/nn/activation.h"

#include "core/nn/on_cuda.h"
#include "core/nn/vector_math.h"

namespace dattn {
namespace {

constexpr std::int64_t kBlock = 4096;         // elements of one block
constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// 0.5 (1 + tanh(z)) = sigmoid(2 z), so gelu(u) = u sigmoid(2 z(u)).
template <class T>
DATTN_VECTORIZED void gelu_block(const T* u, T* a, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = load(u[i]);
    store(a[i], x * fast_sigmoid(2.0f * kRoot * (x + kCubic * x * x * x)));
  }
}

template <class T>
DATTN_VECTORIZED void gelu_gradient_block(const T* __restrict u, const float* __restrict da, T* __restrict a, T* __restrict du,
                                          std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = load(u[i]);
    const float s = fast_sigmoid(2.0f * kRoot * (x + kCubic * x * x * x));
    store(a[i], x * s);
    store(du[i], da[i] * (s + x * s * (1.0f - s) * 2.0f * kRoot * (1.0f + 3.0f * kCubic * x * x)));
  }
}

template <class T>
DATTN_VECTORIZED void swiglu_block(const T* gate, const T* up, T* a, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = load(gate[i]);
    store(a[i], g * fast_sigmoid(g) * load(up[i]));
  }
}

template <class T>
DATTN_VECTORIZED void swiglu_gradient_block(const T* __restrict gate, const T* __restrict up, const float* __restrict da,
                                            T* __restrict a, T* __restrict dgate, T* __restrict dup, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = load(gate[i]), u = load(up[i]), s = fast_sigmoid(g), silu = g * s;
    store(a[i], silu * u);
    store(dup[i], da[i] * silu);
    store(dgate[i], da[i] * u * (s + silu * (1.0f - s)));
  }
}

}  // namespace

void gelu_forward(const TensorView& u, const TensorView& a) {
  if (on_cuda({&u, &a})) return cuda_nn().gelu(u, a, cuda_stream());
  with_number(u.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(u.elements(), kBlock,
                    [&](std::int64_t i, std::int64_t end) { gelu_block(u.ptr<T>() + i, a.ptr<T>() + i, end - i); });
  });
}

Tensor gelu_forward(const TensorView& u) {
  Tensor a = Tensor::uninitialized(u.dtype, u.shape);
  gelu_forward(u, a);
  return a;
}

GeluGradients gelu_backward(const TensorView& u, const TensorView& da) {
  GeluGradients result{Tensor::uninitialized(u.dtype, u.shape), Tensor::uninitialized(u.dtype, u.shape)};
  if (on_cuda({&u, &da, &result.a.view()})) {
    cuda_nn().gelu_backward(u, da, result.a, result.du, cuda_stream());
    return result;
  }
  with_number(u.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(u.elements(), kBlock, [&](std::int64_t i, std::int64_t end) {
      gelu_gradient_block(u.ptr<T>() + i, da.ptr<float>() + i, result.a.ptr<T>() + i, result.du.ptr<T>() + i, end - i);
    });
  });
  return result;
}

Tensor swiglu_forward(const TensorView& gate, const TensorView& up) {
  Tensor a = Tensor::uninitialized(up.dtype, up.shape);
  if (on_cuda({&gate, &up, &a.view()})) {
    cuda_nn().swiglu(gate, up, a, cuda_stream());
    return a;
  }
  with_number(up.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(up.elements(), kBlock, [&](std::int64_t i, std::int64_t end) {
      swiglu_block(gate.ptr<T>() + i, up.ptr<T>() + i, a.ptr<T>() + i, end - i);
    });
  });
  return a;
}

SwigluGradients swiglu_backward(const TensorView& gate, const TensorView& up, const TensorView& da) {
  SwigluGradients result{Tensor::uninitialized(up.dtype, up.shape), Tensor::uninitialized(up.dtype, up.shape),
                         Tensor::uninitialized(up.dtype, up.shape)};
  if (on_cuda({&gate, &up, &da, &result.a.view()})) {
    cuda_nn().swiglu_backward(gate, up, da, result.a, result.dgate, result.dup, cuda_stream());
    return result;
  }
  with_number(up.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(up.elements(), kBlock, [&](std::int64_t i, std::int64_t end) {
      swiglu_gradient_block(gate.ptr<T>() + i, up.ptr<T>() + i, da.ptr<float>() + i, result.a.ptr<T>() + i,
                            result.dgate.ptr<T>() + i, result.dup.ptr<T>() + i, end - i);
    });
  });
  return result;
}

}  // namespace dattn
