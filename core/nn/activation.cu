// gelu and swiglu on the device (see activation.h).
#include "core/device/cuda/loops.h"
#include "core/device/cuda/number.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float gelu_gate(float x) { return sigmoid(2.0f * kRoot * (x + kCubic * x * x * x)); }

template <class T>
struct Gelu {
  const T* u;
  T* a;
  __device__ void operator()(std::int64_t i) const {
    const float x = load(u[i]);
    store(a[i], x * gelu_gate(x));
  }
};

template <class T>
struct GeluGradient {
  const T* u;
  const float* da;
  T *a, *du;
  __device__ void operator()(std::int64_t i) const {
    const float x = load(u[i]), s = gelu_gate(x);
    store(a[i], x * s);
    store(du[i], da[i] * (s + x * s * (1.0f - s) * 2.0f * kRoot * (1.0f + 3.0f * kCubic * x * x)));
  }
};

template <class T>
struct Swiglu {
  const T *gate, *up;
  T* a;
  __device__ void operator()(std::int64_t i) const {
    const float g = load(gate[i]);
    store(a[i], g * sigmoid(g) * load(up[i]));
  }
};

template <class T>
struct SwigluGradient {
  const T *gate, *up;
  const float* da;
  T *a, *dgate, *dup;
  __device__ void operator()(std::int64_t i) const {
    const float g = load(gate[i]), u = load(up[i]), s = sigmoid(g), silu = g * s;
    store(a[i], silu * u);
    store(dup[i], da[i] * silu);
    store(dgate[i], da[i] * u * (s + silu * (1.0f - s)));
  }
};

}  // namespace

void gelu(const TensorView& u, const TensorView& a, NativeStream stream) {
  with_number(u.dtype, [&]<class T>(T) { for_each(u.elements(), stream, Gelu<T>{u.ptr<T>(), a.ptr<T>()}); });
}

void gelu_backward(const TensorView& u, const TensorView& da, const TensorView& a, const TensorView& du, NativeStream stream) {
  with_number(u.dtype, [&]<class T>(T) {
    for_each(u.elements(), stream, GeluGradient<T>{u.ptr<T>(), da.ptr<float>(), a.ptr<T>(), du.ptr<T>()});
  });
}

void swiglu(const TensorView& gate, const TensorView& up, const TensorView& a, NativeStream stream) {
  with_number(up.dtype, [&]<class T>(T) { for_each(up.elements(), stream, Swiglu<T>{gate.ptr<T>(), up.ptr<T>(), a.ptr<T>()}); });
}

void swiglu_backward(const TensorView& gate, const TensorView& up, const TensorView& da, const TensorView& a,
                     const TensorView& dgate, const TensorView& dup, NativeStream stream) {
  with_number(up.dtype, [&]<class T>(T) {
    for_each(up.elements(), stream,
             SwigluGradient<T>{gate.ptr<T>(), up.ptr<T>(), da.ptr<float>(), a.ptr<T>(), dgate.ptr<T>(), dup.ptr<T>()});
  });
}

}  // namespace dattn::cuda
