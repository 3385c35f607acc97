// Forward instances for dims up to 192 and 128.
#include "core/attention/cuda/mma_forward_text.h"

namespace dattn::cuda {

void mma_attend_192(const AttendParams& params, cudaStream_t stream) { launch_mma_forward<192, 128, 2, 32>(params, stream); }

}  // namespace dattn::cuda
