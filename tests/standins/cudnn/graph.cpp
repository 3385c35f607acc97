// A stand-in for cuDNN's attention graphs (core/attention/cudnn/cuda/graph.h) on host memory: plain loops in fp64, results in
// the storage type as cuDNN writes them, delta from dout * out as cuDNN takes it, and the refusals of shapes that its front end
// makes.
#include "core/attention/cudnn/cuda/graph.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/error.h"

namespace dattn::cudnn {
namespace {

// A tensor [B, rows, heads, dim].
template <class T>
struct Rows {
  T* data;
  Strides strides;

  T* row(std::int64_t b, std::int64_t s, std::int64_t h) const {
    return data + b * strides.batch + s * strides.row + h * strides.head;
  }
};
template <class T>
Rows<T> rows_of(void* memory, const Strides& strides) {
  return {static_cast<T*>(memory), strides};
}
Strides contiguous(std::int64_t rows, std::int64_t heads, std::int64_t dim) { return {rows * heads * dim, heads * dim, dim}; }

template <class T>
double dot(const T* a, const T* b, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

template <class T>
void write(T* to, const std::vector<double>& from, std::int64_t begin, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = T(static_cast<float>(from[static_cast<std::size_t>(begin + i)]));
}

// Scores of one query row; -inf where the band hides the key.
template <class T>
struct Scores {
  const GraphProblem& p;
  Rows<T> q, k, bias;

  std::vector<double> of(std::int64_t b, std::int64_t i, std::int64_t h) const {
    std::vector<double> scores(static_cast<std::size_t>(p.keys), -std::numeric_limits<double>::infinity());
    const std::int64_t first = p.left ? std::max<std::int64_t>(0, i - *p.left + 1) : 0;
    const std::int64_t last = p.right ? std::min(p.keys - 1, i + *p.right) : p.keys - 1;
    for (std::int64_t j = first; j <= last; ++j) {
      double& score = scores[static_cast<std::size_t>(j)];
      score = p.scale * dot(q.row(b, i, h), k.row(b, j, h / (p.heads / p.kv_heads)), p.dim_qk);
      if (p.has_bias) score += static_cast<double>(bias.row(p.bias_batch == 1 ? 0 : b, i, p.bias_heads == 1 ? 0 : h)[j]);
    }
    return scores;
  }
};

template <class T>
void forward(const GraphProblem& p, const Buffers& at) {
  const Scores<T> scores{p, rows_of<T>(at.q, p.q), rows_of<T>(at.k, p.k), rows_of<T>(at.bias, p.bias)};
  const Rows<T> v = rows_of<T>(at.v, p.v), out = rows_of<T>(at.out, contiguous(p.rows, p.heads, p.dim_v));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      for (std::int64_t i = 0; i < p.rows; ++i) {
        const std::vector<double> s = scores.of(b, i, h);
        const double most = *std::max_element(s.begin(), s.end());
        double sum = 0;
        for (const double x : s) sum += std::exp(x - most);
        std::vector<double> o(static_cast<std::size_t>(p.dim_v));
        for (std::int64_t j = 0; j < p.keys; ++j) {
          const double share = std::exp(s[static_cast<std::size_t>(j)] - most) / sum;
          const T* const values = v.row(b, j, h / (p.heads / p.kv_heads));
          for (std::size_t d = 0; d < o.size(); ++d) o[d] += share * static_cast<double>(values[d]);
        }
        write(out.row(b, i, h), o, 0, p.dim_v);
        static_cast<float*>(at.stats)[(b * p.heads + h) * p.rows + i] = static_cast<float>(most + std::log(sum));
      }
    }
  }
}

template <class T>
void backward(const GraphProblem& p, const Buffers& at) {
  const Scores<T> scores{p, rows_of<T>(at.q, p.q), rows_of<T>(at.k, p.k), rows_of<T>(at.bias, p.bias)};
  const Rows<T> v = rows_of<T>(at.v, p.v), out = rows_of<T>(at.out, p.dout), dout = rows_of<T>(at.dout, p.dout);
  const Rows<T> dq_out = rows_of<T>(at.dq, contiguous(p.rows, p.heads, p.dim_qk));
  const std::int64_t kv_rows = p.batch * p.keys * p.kv_heads;
  std::vector<double> dk(static_cast<std::size_t>(kv_rows * p.dim_qk)), dv(static_cast<std::size_t>(kv_rows * p.dim_v));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t g = h / (p.heads / p.kv_heads);
      for (std::int64_t i = 0; i < p.rows; ++i) {
        const std::vector<double> s = scores.of(b, i, h);
        const double lse = static_cast<float*>(at.stats)[(b * p.heads + h) * p.rows + i];
        const T *const gradient = dout.row(b, i, h), *const query = scores.q.row(b, i, h);
        const double delta = dot(gradient, out.row(b, i, h), p.dim_v);
        std::vector<double> dq(static_cast<std::size_t>(p.dim_qk));
        for (std::int64_t j = 0; j < p.keys; ++j) {
          const double share = std::exp(s[static_cast<std::size_t>(j)] - lse);
          const double ds = p.scale * share * (dot(gradient, v.row(b, j, g), p.dim_v) - delta);
          const auto row = static_cast<std::size_t>((b * p.keys + j) * p.kv_heads + g);
          const T* const key = scores.k.row(b, j, g);
          for (std::size_t d = 0; d < dq.size(); ++d) {
            dq[d] += ds * static_cast<double>(key[d]);
            dk[row * dq.size() + d] += ds * static_cast<double>(query[d]);
          }
          for (std::int64_t d = 0; d < p.dim_v; ++d)
            dv[row * static_cast<std::size_t>(p.dim_v) + static_cast<std::size_t>(d)] +=
                share * static_cast<double>(gradient[d]);
        }
        write(dq_out.row(b, i, h), dq, 0, p.dim_qk);
      }
    }
  }
  write(static_cast<T*>(at.dk), dk, 0, kv_rows * p.dim_qk);
  write(static_cast<T*>(at.dv), dv, 0, kv_rows * p.dim_v);
}

class HostPlan : public GraphPlan {
 public:
  explicit HostPlan(const GraphProblem& problem) : problem_(problem) {}

  std::int64_t workspace_bytes() const override { return problem_.deterministic ? problem_.rows * problem_.keys : 256; }

  void run(const Buffers& buffers, void* /*workspace*/, void* stream) const override {
    auto* const work = new std::function<void()>(
        [this, buffers] { problem_.storage == DType::kF16 ? compute<Float16>(buffers) : compute<BFloat16>(buffers); });
    const auto call = [](void* argument) {
      const std::unique_ptr<std::function<void()>> owned(static_cast<std::function<void()>*>(argument));
      (*owned)();
    };
    ensure(cudaLaunchHostFunc(static_cast<cudaStream_t>(stream), call, work) == cudaSuccess, "the stand-in's stream is broken");
  }

 private:
  template <class T>
  void compute(const Buffers& buffers) const {
    problem_.backward ? backward<T>(problem_, buffers) : forward<T>(problem_, buffers);
  }

  GraphProblem problem_;
};

}  // namespace

std::string missing() { return ""; }

// DATTN_CUDNN_STANDIN_VERSION: what it says it is.
std::string version() {
  const char* claimed = std::getenv("DATTN_CUDNN_STANDIN_VERSION");
  return claimed == nullptr ? "9.19.0" : claimed;
}

Planned make_plan(const GraphProblem& p, const Target& /*target*/) {
  if (p.left && p.rows > p.keys) return {nullptr, "Sliding window attention is only supported with max_s_q <= max_s_kv."};
  if ((p.right && *p.right < 0) || (p.left && *p.left < 1))
    return {nullptr, "Right bound needs to be larger than or equal to zero"};
  if (p.heads % p.kv_heads != 0)
    return {nullptr, "number of heads for key and query must be a factor of number of heads for query"};
  return {std::make_unique<HostPlan>(p), {}};
}

}  // namespace dattn::cudnn
