#include "core/device/step_graph.h"

#include "core/device/cuda_module.h"
#include "core/device/stream.h"

namespace dattn {

StepGraph::~StepGraph() {
  if (native_ != nullptr) cuda_module().destroy_step(native_);
}

void StepGraph::run(std::span<const std::int64_t> key, const std::function<void()>& step) {
  if (!current_device().is_cuda()) return step();
  const CudaModule& cuda = cuda_module();
  NativeStream const stream = current_stream().native();
  if (native_ == nullptr) native_ = cuda.make_step();
  const bool again = cuda.begin_step(native_, key, stream);
  try {
    step();
  } catch (...) {
    cuda.abandon_step(native_, stream);
    throw;
  }
  cuda.end_step(native_, stream);
  replays_ += again;
}

}  // namespace dattn
