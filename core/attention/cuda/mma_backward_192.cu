// Backward instances for dims up to 192 and 128.
#include "core/attention/cuda/mma_backward_text.h"

namespace dattn::cuda {

void mma_attend_grad_192(const GradParams& params, cudaStream_t stream) { launch_mma_backward<192, 128>(params, stream); }

}  // namespace dattn::cuda
