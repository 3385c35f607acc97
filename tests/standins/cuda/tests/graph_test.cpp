// Graphs: what is captured runs at each launch and not before; what cannot be captured is refused.
#include <cstring>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/standins/cuda/tests/support.h"

namespace dattn::cuda {
namespace {

using ::testing::HasSubstr;

__global__ void multiply_add(double* number, double factor, const double* term) { *number = *number * factor + *term; }

class CudaStandinGraph : public ::testing::Test {
 protected:
  CudaStandinGraph() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~CudaStandinGraph() override {
    cudaGraphExecDestroy(exec_);
    cudaStreamDestroy(stream_);
  }
  void begin() { check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture"); }
  void end() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&exec_, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  void launch_graph() {
    check(cudaGraphLaunch(exec_, stream_), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

TEST_F(CudaStandinGraph, RunsAtEachLaunchWithWhatPinnedMemoryHoldsThen) {
  const Array<double> number(std::vector<double>{1.0});
  void* pinned = nullptr;
  check(cudaMallocHost(&pinned, sizeof(double)), "cudaMallocHost");
  auto* const term = static_cast<double*>(pinned);
  begin();
  void* copied = nullptr;  // memory of the graph
  check(cudaMallocAsync(&copied, sizeof(double), stream_), "cudaMallocAsync");
  check(cudaMemcpyAsync(copied, term, sizeof(double), cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  launch(multiply_add, dim3(1), dim3(1), 0, stream_, number.data(), 2.0, static_cast<const double*>(copied));
  check(cudaFreeAsync(copied, stream_), "cudaFreeAsync");
  end();
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  EXPECT_EQ(number.values()[0], 1.0) << "it ran while it was captured";
  *term = 1;
  launch_graph();
  EXPECT_EQ(number.values()[0], 3.0);
  *term = 5;
  launch_graph();
  EXPECT_EQ(number.values()[0], 11.0);
  cudaFreeHost(pinned);
}

TEST_F(CudaStandinGraph, RefusesWhatCannotBeCaptured) {
  const Array<double> number(1);
  double pageable = 0;
  cudaEvent_t event = nullptr;
  cudaEventCreateWithFlags(&event, 0);
  begin();
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorStreamCaptureUnsupported);
  EXPECT_THAT(cudaGetErrorString(cudaGetLastError()), HasSubstr("cudaStreamSynchronize on a stream that is captured"));
  EXPECT_EQ(cudaMemcpyAsync(number.data(), &pageable, sizeof pageable, cudaMemcpyDefault, stream_),
            cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaMemcpyAsync(&pageable, number.data(), sizeof pageable, cudaMemcpyDefault, stream_),
            cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaEventRecord(event, stream_), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaFreeAsync(number.data(), stream_), cudaErrorInvalidValue);  // of another time
  void* outlives = nullptr;
  check(cudaMallocAsync(&outlives, 8, stream_), "cudaMallocAsync");
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeAsync(outlives, stream_), cudaErrorInvalidValue);
  cudaGetLastError();
  cudaEventDestroy(event);
}

}  // namespace
}  // namespace dattn::cuda
