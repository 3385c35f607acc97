// The positions of rows, from runs.
#include "core/attention/cuda/launchers.h"
#include "core/device/cuda/language.h"

namespace dattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksOfRun = 16;

__global__ void DATTN_LAUNCH_BOUNDS(kThreads, 1) expand_runs(const PositionRun* runs, std::int64_t* positions) {
  const PositionRun run = runs[blockIdx.x];
  const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  for (int i = first; i < run.count; i += kThreads * kBlocksOfRun) positions[run.row + i] = run.position + i * run.step;
}

}  // namespace

void expand_positions(const PositionRun* runs, int n_runs, std::int64_t* positions, cudaStream_t stream) {
  launch(&expand_runs, dim3(static_cast<unsigned>(n_runs), kBlocksOfRun), dim3(kThreads), 0, stream, runs, positions);
}

}  // namespace dattn::cuda
