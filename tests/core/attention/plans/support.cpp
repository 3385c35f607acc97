// What cuDNN takes of what the kernel `cudnn` may ask, found out without a GPU: graphs are planned for devices that are only
// described, with a stand-in for the driver (tests/standins/driver), and the outcome is compared with support.txt.
//
// usage: dattn_cudnn_support TABLE [--write]
// exit codes: 0 as the table says, 1 something differs, 77 there is no libcudnn or not the one of the table
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "core/attention/cudnn/cuda/graph.h"
#include "core/attention/cudnn/library.h"

namespace dattn::cudnn {
namespace {

struct Model {
  const char* name;
  int compute_capability, multiprocessors, clock_khz, memory_clock_khz;
  std::int64_t shared_bytes, l2_bytes, memory_bytes;
};
// From the vendor's data sheets and the CUDA programming guide's table of compute capabilities.
constexpr Model kModels[] = {{"A100", 80, 108, 1410000, 1593000, 166912, 41943040, 85094825984},
                             {"H100", 90, 132, 1980000, 2619000, 232448, 52428800, 85028765696},
                             {"B200", 100, 148, 1965000, 3996000, 232448, 132644864, 191514869760}};

Target target_of(const Model& m) {
  return {0, m.compute_capability,
          fmt::format(
              R"({{"cudaDeviceId":0,"deviceName":"NVIDIA {}","deviceVer":{},"driverVer":13000,"isTccDriver":0,"pciDeviceId":0,)"
              R"("supportCoopLaunch":1,"warpSize":32,"regsPerBlock":65536,"maxRegistersPerSM":65536,"maxCtasPerSM":32,)"
              R"("maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"maxBlockSize":[1024,1024,64],)"
              R"("maxGridSize":[2147483647,65535,65535],"maxSharedMemoryPerBlock":49152,"reservedSharedMemoryPerBlock":1024,)"
              R"("multiProcessorCount":{},"smClockRateKHz":{},"memClockRateKHz":{},"maxSharedMemoryPerBlockOptin":{},)"
              R"("l2CacheSize":{},"totalGlobalMem":{}}})",
              m.name, m.compute_capability * 10, m.multiprocessors, m.clock_khz, m.memory_clock_khz, m.shared_bytes, m.l2_bytes,
              m.memory_bytes)};
}

struct Case {
  std::string name;
  GraphProblem problem;
  bool backward_only = false;
};

GraphProblem causal(std::int64_t rows, std::int64_t keys, std::int64_t dim_qk, std::int64_t dim_v) {
  GraphProblem p;
  p.batch = 2;
  p.heads = 8;
  p.kv_heads = 2;
  p.rows = rows;
  p.keys = keys;
  p.dim_qk = dim_qk;
  p.dim_v = dim_v;
  p.right = 0;
  p.scale = 0.125;
  return p;
}

GraphProblem with(GraphProblem p, std::optional<std::int64_t> left, std::optional<std::int64_t> right) {
  p.left = left;
  p.right = right;
  return p;
}

GraphProblem with_bias(GraphProblem p, std::int64_t batch, std::int64_t heads) {
  p.has_bias = true;
  p.bias_batch = batch;
  p.bias_heads = heads;
  p.bias = {p.rows * heads * p.keys, heads * p.keys, p.keys};
  return p;
}

GraphProblem in_fp16(GraphProblem p) {
  p.storage = DType::kF16;
  return p;
}

GraphProblem deterministic(GraphProblem p) {
  p.deterministic = true;
  return p;
}

std::vector<Case> cases() {
  const GraphProblem base = causal(1024, 1024, 128, 128);
  return {{"causal", base},
          {"full, 1021 rows, 700 keys", with(causal(1021, 700, 64, 64), {}, {})},
          {"band of 129 and 16, fewer rows", with(causal(512, 1024, 128, 128), 129, 16)},
          {"left bound, more rows than keys", with(causal(1024, 512, 128, 128), 129, 0)},
          {"causal, bias of all heads", with_bias(base, 1, 8)},
          {"causal, fp16", in_fp16(base)},
          {"band of 129 and 16, fewer rows, fp16", in_fp16(with(causal(512, 1024, 128, 128), 129, 16))},
          {"causal, dims 192 and 128", causal(1024, 1024, 192, 128)},
          {"causal, dims 192", causal(1024, 1024, 192, 192)},
          {"causal, dims 256", causal(1024, 1024, 256, 256)},
          {"causal, dims 68", causal(1024, 1024, 68, 68)},
          {"causal, deterministic", deterministic(base), true},
          {"causal, deterministic, 16384 rows", deterministic(causal(16384, 16384, 128, 128)), true}};
}

GraphProblem complete(GraphProblem p, bool backward) {
  p.backward = backward;
  p.q = {p.rows * p.heads * p.dim_qk, p.heads * p.dim_qk, p.dim_qk};
  p.k = {p.keys * p.kv_heads * p.dim_qk, p.kv_heads * p.dim_qk, p.dim_qk};
  p.v = {p.keys * p.kv_heads * p.dim_v, p.kv_heads * p.dim_v, p.dim_v};
  p.dout = {p.rows * p.heads * p.dim_v, p.heads * p.dim_v, p.dim_v};
  return p;
}

std::string outcome(const GraphProblem& problem, const Target& target) {
  const Planned planned = make_plan(problem, target);
  if (planned.plan != nullptr)
    return fmt::format("taken, {} KiB of workspace", (planned.plan->workspace_bytes() + 1023) / 1024);
  return "refused: " + planned.why.substr(0, planned.why.find('\n'));
}

std::string table() {
  std::string text = fmt::format("cuDNN {}\n", version_text(library().version));
  for (const Model& model : kModels) {
    for (const Case& one : cases()) {
      for (const bool backward : {false, true}) {
        if (one.backward_only && !backward) continue;
        text += fmt::format("{} | {:<8} | {:<36} | {}\n", model.name, backward ? "backward" : "forward", one.name,
                            outcome(complete(one.problem, backward), target_of(model)));
      }
    }
  }
  return text;
}

int skip(const std::string& why) {
  fmt::print("skipped: {}\n", why);
  return 77;
}

int run(const std::string& path, bool write) {
  if (const std::string why = missing(); !why.empty()) return skip(why);
  std::ifstream file(path);
  std::string first;
  std::getline(file, first);
  const std::string have = "cuDNN " + version_text(library().version);
  if (!write && first != have) return skip(fmt::format("{} is of {}, here is {}", path, first, have));
  const std::string found = table();
  if (write) {
    std::ofstream(path) << found;
    return 0;
  }
  std::istringstream lines(found);
  std::string line, expected;
  std::getline(lines, line);
  int differing = 0;
  while (std::getline(lines, line)) {
    if (!std::getline(file, expected)) expected = "nothing";
    if (line == expected) continue;
    fmt::print("expected: {}\n   found: {}\n", expected, line);
    ++differing;
  }
  fmt::print("{} of {} differ\n", differing, path);
  return differing == 0 && !std::getline(file, expected) ? 0 : 1;
}

}  // namespace
}  // namespace dattn::cudnn

int main(int count, char** arguments) {
  if (count < 2) return 2;
  return dattn::cudnn::run(arguments[1], count == 3 && std::string(arguments[2]) == "--write");
}
