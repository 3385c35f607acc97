// Forward instances for dims up to 256 and 256.
#include "core/attention/cuda/mma_forward_text.h"

namespace dattn::cuda {

void mma_attend_256(const AttendParams& params, cudaStream_t stream) { launch_mma_forward<256, 256, 1, 32>(params, stream); }

}  // namespace dattn::cuda
