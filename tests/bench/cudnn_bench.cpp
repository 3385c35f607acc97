// Speed of cuDNN's attention graphs alone, without what kernel `cudnn` does around them: GFLOP/s of runs that a stream is given
// one after the other, as core/attention/cudnn/cuda/graph.h describes them. FLOPs are counted as `dattn bench attention` does.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "core/attention/cudnn/cuda/graph.h"
#include "core/attention/mask.h"
#include "core/base/error.h"
#include "core/base/philox.h"
#include "core/device/cuda_module.h"
#include "tests/bench/program.h"

namespace {

using namespace dattn;  // NOLINT: a program

struct Options {
  std::int64_t seq = 2048, batch = 8, heads = 16, dim = 128;
  std::string mask = "causal";
  int repeat = 10;
};

cudnn::GraphProblem problem_of(const Options& o, bool backward) {
  const cudnn::Strides strides{o.seq * o.heads * o.dim, o.heads * o.dim, o.dim};
  cudnn::GraphProblem p;
  p.backward = backward;
  p.batch = o.batch;
  p.rows = p.keys = o.seq;
  p.heads = p.kv_heads = o.heads;
  p.dim_qk = p.dim_v = o.dim;
  if (o.mask == "causal") p.right = 0;
  p.scale = 1 / std::sqrt(static_cast<double>(o.dim));
  p.q = p.k = p.v = p.dout = strides;
  return p;
}

// Memory of the first device, until the program ends.
class Memory {
 public:
  Memory(const CudaModule& cuda, NativeStream stream) : cuda_(cuda), stream_(stream) {}

  void* empty(std::int64_t bytes) const {
    return cuda_.allocate(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)), stream_);
  }
  void* random(std::int64_t count, std::uint64_t seed) const {
    std::vector<BFloat16> values(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i)
      values[static_cast<std::size_t>(i)] = BFloat16(2 * philox_uniform(seed, 0, static_cast<std::uint64_t>(i)) - 1);
    void* const memory = empty(count * 2);
    cuda_.copy_bytes(memory, values.data(), values.size() * sizeof(BFloat16), stream_);
    return memory;
  }

 private:
  const CudaModule& cuda_;
  NativeStream stream_;
};

double seconds_of(const Options& o, bool backward, const cudnn::Buffers& buffers, const CudaModule& cuda, NativeStream stream) {
  const cudnn::Planned planned = cudnn::make_plan(problem_of(o, backward), {});
  require(planned.plan != nullptr, "cuDNN plans no {} graph of this shape: {}", backward ? "backward" : "forward", planned.why);
  void* const workspace = Memory(cuda, stream).empty(planned.plan->workspace_bytes());
  const auto run = [&] { planned.plan->run(buffers, workspace, stream); };
  run();
  cuda.synchronize(stream);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < o.repeat; ++i) run();
  cuda.synchronize(stream);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / o.repeat;
}

void run(const Options& o) {
  require(o.mask == "full" || o.mask == "causal", "mask '{}' is unknown; use full or causal", o.mask);
  const std::string missing = cudnn::missing();
  if (!missing.empty()) fail(ErrorCode::kSystem, "{}", missing);
  const CudaModule& cuda = cuda_module();
  cuda.set_device(0);
  NativeStream const stream = cuda.make_stream(false);
  const Memory memory(cuda, stream);
  const std::int64_t count = o.batch * o.seq * o.heads * o.dim;
  cudnn::Buffers buffers{.q = memory.random(count, 1), .k = memory.random(count, 2), .v = memory.random(count, 3)};
  buffers.out = memory.empty(count * 2);
  buffers.stats = memory.empty(o.batch * o.heads * o.seq * 4);
  const double forward = seconds_of(o, false, buffers, cuda, stream);
  buffers.dout = memory.random(count, 4);
  buffers.dq = memory.empty(count * 2);
  buffers.dk = memory.empty(count * 2);
  buffers.dv = memory.empty(count * 2);
  const double backward = seconds_of(o, true, buffers, cuda, stream);
  const Mask mask = o.mask == "causal" ? Mask::causal() : Mask::full();
  const double flops = 4.0 * static_cast<double>(area(compile(mask, o.seq, o.seq)) * o.batch * o.heads * o.dim);
  fmt::print(
      "{{\"event\":\"done\",\"cudnn\":\"{}\",\"forward_gflops\":{:.1f},\"backward_gflops\":{:.1f},\"milliseconds\":[{:.4f},"
      "{:.4f}]}}\n",
      cudnn::version(), flops / forward * 1e-9, 2.5 * flops / backward * 1e-9, forward * 1e3, backward * 1e3);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"GFLOP/s of cuDNN's attention graphs in bf16, on the first CUDA device; one JSON line"};
  app.add_option("--seq", options.seq, "queries and keys");
  app.add_option("--batch", options.batch);
  app.add_option("--heads", options.heads);
  app.add_option("--dim", options.dim);
  app.add_option("--mask", options.mask, "full or causal");
  app.add_option("--repeat", options.repeat, "timed runs")->check(CLI::PositiveNumber);
  return run_program(app, argc, argv, [&] { run(options); });
}
