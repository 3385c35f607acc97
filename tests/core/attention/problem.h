// An attention problem with random inputs, run by any kernel in any type, for the kernel tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "core/attention/kernel.h"
#include "core/attention/mask.h"
#include "core/attention/state.h"
#include "core/base/philox.h"

namespace dattn::testing {

struct Problem {
  std::int64_t batch = 1, seq_q = 1, seq_kv = 1, heads = 1, kv_heads = 1, dim_qk = 1, dim_v = 1;
  HeadMap map;
  std::vector<Tile> tiles;
  double scale = 0.0;      // 0: 1 / sqrt(dim_qk)
  float magnitude = 1.0f;  // standard deviation of q and k
  double softcap = 0.0;
  std::vector<double> slopes{};
  Shape bias{};            // no axes: none
  bool fp32_bias = false;  // else in storage type
  AttentionDropout dropout{};
  bool invariant = false;

  double factor() const { return scale != 0.0 ? scale : 1.0 / std::sqrt(static_cast<double>(dim_qk)); }
};

inline std::vector<Tile> tiles_of(const Mask& mask, std::int64_t seq_q, std::int64_t seq_kv) {
  const auto regions = compile(mask, seq_q, seq_kv);
  return make_tiles(regions, Positions::range(0, seq_q), Positions::range(0, seq_kv));
}

inline Problem make_problem(std::int64_t seq_q, std::int64_t seq_kv, std::int64_t heads, std::int64_t kv_heads,
                            std::int64_t dim_qk, std::int64_t dim_v, const Mask& mask) {
  Problem p;
  p.seq_q = seq_q;
  p.seq_kv = seq_kv;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim_qk = dim_qk;
  p.dim_v = dim_v;
  p.map.group = heads / kv_heads;
  p.tiles = tiles_of(mask, seq_q, seq_kv);
  return p;
}

struct Inputs {
  Tensor q, k, v, dout, bias;
};

inline Tensor random_tensor(const Shape& shape, std::uint64_t seed, float magnitude, DType rounded_to) {
  Tensor tensor(DType::kF64, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    tensor.ptr<double>()[i] = magnitude * philox_normal(seed, 0, static_cast<std::uint64_t>(i));
  }
  return to_dtype(to_dtype(tensor, rounded_to), DType::kF64);
}

// Inputs in fp64 whose values are exact in `storage`, so that every kernel sees the same numbers.
inline Inputs random_inputs(const Problem& p, DType storage, std::uint64_t seed = 1) {
  return {random_tensor({p.batch, p.seq_q, p.heads, p.dim_qk}, seed, p.magnitude, storage),
          random_tensor({p.batch, p.seq_kv, p.kv_heads, p.dim_qk}, seed + 1, p.magnitude, storage),
          random_tensor({p.batch, p.seq_kv, p.kv_heads, p.dim_v}, seed + 2, 1.0f, storage),
          random_tensor({p.batch, p.seq_q, p.heads, p.dim_v}, seed + 3, 1.0f, storage),
          p.bias.axes > 0 ? random_tensor(p.bias, seed + 4, 1.0f, storage) : Tensor()};
}

// The terms of a problem; `bias` is the tensor of its bias, undefined where it has none.
inline ScoreTerms terms_of(const Problem& p, const Tensor& bias) { return {p.softcap, p.slopes, bias.view(), p.dropout}; }

struct Results {
  Tensor out, lse, dq, dk, dv, dbias{};
};

// On `device`; results are brought back.
inline Results run_kernel(const AttentionKernel& kernel, const Problem& p, const Inputs& inputs, DType storage,
                          Device device = {}) {
  const DeviceScope scope(device);
  const auto send = [&](const Tensor& tensor, DType type) { return to_device(to_dtype(tensor, type), device); };
  const Tensor q = send(inputs.q, storage), k = send(inputs.k, storage), v = send(inputs.v, storage);
  const Tensor dout = send(inputs.dout, storage);
  const Tensor bias = inputs.bias.defined() ? send(inputs.bias, p.fp32_bias ? DType::kF32 : storage) : Tensor();
  const ScoreTerms terms = terms_of(p, bias);
  const DType sum = accumulate_type(storage);
  Results r{Tensor(sum, {p.batch, p.seq_q, p.heads, p.dim_v}),
            Tensor(sum, {p.batch, p.heads, p.seq_q}),
            Tensor(sum, q->shape),
            Tensor(sum, k->shape),
            Tensor(sum, v->shape),
            bias.defined() ? Tensor(sum, bias->shape) : Tensor()};
  kernel.attend({q, k, v, p.map, p.tiles, p.factor(), r.out, r.lse, false, terms, p.invariant});
  const Tensor delta(sum, {p.batch, p.heads, p.seq_q});
  attention_delta(dout, r.out, delta);
  kernel.attend_grad({q, k, v, p.map, p.tiles, p.factor(), dout, r.lse, delta, r.dq, r.dk, r.dv, terms, p.invariant, r.dbias});
  if (!device.is_cuda()) return r;
  const auto bring = [](const Tensor& tensor) { return tensor.defined() ? to_device(tensor, {}) : Tensor(); };
  return {bring(r.out), bring(r.lse), bring(r.dq), bring(r.dk), bring(r.dv), bring(r.dbias)};
}

// ||a - b|| / ||b||, where equal infinities differ by 0; where b vanishes, the root mean square of a; inf where NaN or
// one infinity meets.
inline double relative_error(const Tensor& a, const Tensor& b) {
  const Tensor x = to_dtype(a, DType::kF64), y = to_dtype(b, DType::kF64);
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < y->elements(); ++i) {
    const double u = x.ptr<double>()[i], w = y.ptr<double>()[i];
    if (u == w) {
      norm += std::isinf(w) ? 0.0 : w * w;
      continue;
    }
    if (!std::isfinite(u) || !std::isfinite(w)) return std::numeric_limits<double>::infinity();
    difference += (u - w) * (u - w);
    norm += w * w;
  }
  const auto count = static_cast<double>(std::max<std::int64_t>(1, y->elements()));
  return std::sqrt(difference / (norm > 1e-20 * count ? norm : count));
}

// Sets an environment variable for a scope.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~ScopedEnv() {
    if (old_.empty())
      unsetenv(name_);
    else
      setenv(name_, old_.c_str(), 1);
  }
  ScopedEnv(const ScopedEnv&) = delete;
  ScopedEnv& operator=(const ScopedEnv&) = delete;

 private:
  const char* name_;
  std::string old_;
};

}  // namespace dattn::testing
