// The table of the CUDA module (core/device/cuda_module.h), found by the program under the name dattn_cuda_module.
#include "core/attention/cuda/kernels.h"
#include "core/attention/cudnn/cuda/graph.h"
#include "core/device/cuda/runtime.h"
#include "core/device/cuda/step.h"
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {
namespace {

const CudaModule kTable{
    .version = kCudaModuleVersion,
    .flavour = DATTN_CUDA_FLAVOUR,  // by the build: of these sources, or of the same against the tests' stand-in
    .devices = devices,
    .versions = versions,
    .set_device = set_device,
    .allocate = allocate,
    .free = release,
    .allocate_pinned = allocate_pinned,
    .free_pinned = free_pinned,
    .memory_now = memory_now,
    .make_stream = make_stream,
    .destroy_stream = destroy_stream,
    .synchronize = synchronize,
    .make_event = make_event,
    .destroy_event = destroy_event,
    .record = record,
    .wait_event = wait_event,
    .event_done = event_done,
    .synchronize_event = synchronize_event,
    .make_step = make_step,
    .destroy_step = destroy_step,
    .begin_step = begin_step,
    .end_step = end_step,
    .abandon_step = abandon_step,
    .copy_bytes = copy_bytes,
    .copy_pinned = copy_pinned,
    .fill_zero = fill_zero,
    .copy = copy,
    .add = add,
    .take_maximum = take_maximum,
    .clear_state = clear_state,
    .merge_state = merge_state,
    .merge_sink = merge_sink,
    .add_sink_gradient = add_sink_gradient,
    .attention_delta = attention_delta,
    .store_row = store_row,
    .kernels = cuda_kernels,
    .cudnn_version = cudnn::version,
    .nn = &kNnTable,
    .matmul_library = matmul_library,
};

}  // namespace
}  // namespace dattn::cuda

extern "C" __attribute__((visibility("default"))) const dattn::CudaModule* dattn_cuda_module(const dattn::CudaHost* host) {
  if (host != nullptr) dattn::cuda::bind_host(host);
  return &dattn::cuda::kTable;
}
