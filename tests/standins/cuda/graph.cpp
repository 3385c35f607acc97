// Graphs: what a stream is given while it is captured is kept, in order, and given to a stream at each launch. Memory that is
// allocated meanwhile belongs to the graph.
#include "graph.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "memory.h"
#include "stream.h"

using namespace dattn::cuda::standin;  // NOLINT: the functions below are named by CUDA

namespace dattn::cuda::standin {

Capture::~Capture() {
  for (const Block& block : blocks) free_of_graph(block.memory);
}

bool Capture::free(void* memory) {
  const auto block = std::find_if(blocks.begin(), blocks.end(), [&](const Block& one) { return one.memory == memory; });
  if (block == blocks.end() || std::exchange(block->freed, true)) return false;
  work.push_back([memory, bytes = block->bytes] { std::memset(memory, kFreed, bytes); });
  return true;
}

cudaError_t refuse_in_capture(const CUstream_st& stream, const char* what) {
  if (stream.capture == nullptr) return cudaSuccess;
  return report(cudaErrorStreamCaptureUnsupported, std::string(what) + " on a stream that is captured");
}

}  // namespace dattn::cuda::standin

struct CUgraph_st {
  std::shared_ptr<const Capture> capture;
};
struct CUgraphExec_st {
  std::shared_ptr<const Capture> capture;
};

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  if (stream == nullptr) return report(cudaErrorStreamCaptureUnsupported, "the device's own stream is not captured");
  if (stream->capture != nullptr) return report(cudaErrorInvalidValue, "the stream is captured already");
  stream->capture = std::make_shared<Capture>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream->capture == nullptr) return report(cudaErrorInvalidValue, "the stream is not captured");
  const std::shared_ptr<Capture> captured = std::exchange(stream->capture, nullptr);
  if (std::any_of(captured->blocks.begin(), captured->blocks.end(), [](const auto& block) { return !block.freed; }))
    return report(cudaErrorInvalidValue,
                  "memory that was allocated in a capture outlives it: its graph cannot be launched twice");
  *graph = new CUgraph_st{captured};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long /*flags*/) {
  *exec = new CUgraphExec_st{graph->capture};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  if (const cudaError_t error = report_lost()) return error;
  CUstream_st& stream = *CUstream_st::of(handle);
  if (const cudaError_t error = refuse_in_capture(stream, "cudaGraphLaunch")) return error;
  for (const auto& work : exec->capture->work) stream.push([capture = exec->capture, &work] { work(); });
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
