// Backward instances for dims up to 128 and 128.
#include "core/attention/cuda/mma_backward_text.h"

namespace dattn::cuda {

void mma_attend_grad_128(const GradParams& params, cudaStream_t stream) { launch_mma_backward<128, 128>(params, stream); }

}  // namespace dattn::cuda
