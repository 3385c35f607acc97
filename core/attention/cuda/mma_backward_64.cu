// Backward instances for dims up to 64 and 64.
#include "core/attention/cuda/mma_backward_text.h"

namespace dattn::cuda {

void mma_attend_grad_64(const GradParams& params, cudaStream_t stream) { launch_mma_backward<64, 64>(params, stream); }

}  // namespace dattn::cuda
