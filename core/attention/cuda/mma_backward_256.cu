// Backward instances for dims up to 256 and 256.
#include "core/attention/cuda/mma_backward_text.h"

namespace dattn::cuda {

void mma_attend_grad_256(const GradParams& params, cudaStream_t stream) { launch_mma_backward<256, 256>(params, stream); }

}  // namespace dattn::cuda
