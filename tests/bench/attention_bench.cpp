// Speed of the attention kernel on this machine: forward and backward, GFLOP/s, median of repeats.
// FLOPs = 4 * S * S * D * H forward (by visible area under a mask), backward 2.5 times that.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "core/attention/kernel.h"
#include "core/attention/mask.h"
#include "core/attention/state.h"
#include "core/base/error.h"
#include "core/base/philox.h"
#include "core/base/threads.h"
#include "tests/bench/program.h"

namespace {

using namespace dattn;  // NOLINT: a program

struct Options {
  std::int64_t seq = 2048, queries = 0, heads = 4, kv_heads = 0, dim = 64, window = 512;
  std::string dtype = "fp32", mask = "causal", kernel;
  int threads = 1, repeat = 7;
  bool cpu_time = false, alibi = false, invariant = false;
  double softcap = 0, dropout = 0;
};

Tensor random_tensor(DType type, const Shape& shape, std::uint64_t seed) {
  Tensor tensor(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    tensor.ptr<float>()[i] = 2 * philox_uniform(seed, 0, static_cast<std::uint64_t>(i)) - 1;
  }
  return to_dtype(tensor, type);
}

Mask mask_of(const Options& options) {
  if (options.mask == "full") return Mask::full();
  if (options.mask == "causal") return Mask::causal();
  require(options.mask == "window", "mask '{}' is unknown; use full, causal or window", options.mask);
  return Mask::window(options.window, 0);
}

double now(bool cpu_time) {
  if (cpu_time) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Median seconds of one call.
template <class Body>
double median_seconds(const Options& options, const Body& body) {
  body();
  std::vector<double> seconds;
  for (int i = 0; i < options.repeat; ++i) {
    const double start = now(options.cpu_time);
    body();
    seconds.push_back(now(options.cpu_time) - start);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

void run(const Options& o) {
  set_num_threads(o.threads);
  const std::int64_t queries = o.queries > 0 ? o.queries : o.seq, kv_heads = o.kv_heads > 0 ? o.kv_heads : o.heads;
  const DType type = dtype_from(o.dtype);
  const Shape q_shape{1, queries, o.heads, o.dim}, k_shape{1, o.seq, kv_heads, o.dim};
  const Tensor q = random_tensor(type, q_shape, 1), k = random_tensor(type, k_shape, 2), v = random_tensor(type, k_shape, 3);
  const Tensor dout = random_tensor(type, q_shape, 4);
  const auto regions = compile(mask_of(o), queries, o.seq);
  const auto tiles = make_tiles(regions, Positions::range(0, queries), Positions::range(0, o.seq));
  const DType sum = accumulate_type(type);
  const Tensor out(sum, q_shape), lse(sum, {1, o.heads, queries}), delta(sum, {1, o.heads, queries});
  const Tensor dq(sum, q_shape), dk(sum, k_shape), dv(sum, k_shape);
  const AttentionKernel& kernel = o.kernel.empty() ? select_kernel({type, o.dim, o.dim}) : find_kernel(o.kernel);
  HeadMap map;
  map.group = o.heads / kv_heads;
  const double scale = 1 / std::sqrt(static_cast<double>(o.dim));
  const std::vector<double> slopes(o.alibi ? static_cast<std::size_t>(o.heads) : 0, 0.01);
  ScoreTerms terms;
  terms.softcap = o.softcap;
  terms.alibi_slopes = slopes;
  terms.dropout.p = o.dropout;
  terms.dropout.heads = o.heads;
  const double flops = 4.0 * static_cast<double>(area(tiles) * o.heads * o.dim);
  const double forward = median_seconds(o, [&] {
    kernel.attend({q, k, v, map, tiles, scale, out, lse, false, terms, o.invariant});
  });
  const double backward = median_seconds(o, [&] {
    attention_delta(dout, out, delta);
    kernel.attend_grad({q, k, v, map, tiles, scale, dout, lse, delta, dq, dk, dv, terms, o.invariant});
  });
  fmt::print(
      "{{\"kernel\": \"{}\", \"seq\": {}, \"queries\": {}, \"heads\": {}, \"dim\": {}, \"dtype\": \"{}\", \"mask\": \"{}\", "
      "\"threads\": {}, \"forward_ms\": {:.3f}, \"backward_ms\": {:.3f}, \"forward_gflops\": {:.1f}, "
      "\"backward_gflops\": {:.1f}}}\n",
      kernel.name(), o.seq, queries, o.heads, o.dim, o.dtype, o.mask, o.threads, forward * 1e3, backward * 1e3,
      flops / forward * 1e-9, 2.5 * flops / backward * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"GFLOP/s of the attention kernel; one JSON line"};
  app.add_option("--seq", options.seq, "keys, and queries unless --queries is given");
  app.add_option("--queries", options.queries);
  app.add_option("--heads", options.heads);
  app.add_option("--kv-heads", options.kv_heads);
  app.add_option("--dim", options.dim);
  app.add_option("--dtype", options.dtype, "fp32, bf16 or fp64");
  app.add_option("--mask", options.mask, "full, causal or window");
  app.add_option("--window", options.window, "keys to the left that a window mask shows");
  app.add_option("--threads", options.threads);
  app.add_option("--repeat", options.repeat);
  app.add_option("--kernel", options.kernel, "a kernel by name instead of the first that accepts");
  app.add_option("--softcap", options.softcap, "tanh cap of the scores; 0 = none");
  app.add_option("--dropout", options.dropout, "probability of dropping");
  app.add_flag("--alibi", options.alibi, "scores fall with the distance");
  app.add_flag("--invariant", options.invariant, "bits of a row do not depend on the other rows");
  app.add_flag("--cpu-time", options.cpu_time, "processor time of all threads instead of wall time, for busy machines");
  return run_program(app, argc, argv, [&] { run(options); });
}
