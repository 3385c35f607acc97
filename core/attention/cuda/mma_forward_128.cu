// Forward instances for dims up to 128 and 128.
#include "core/attention/cuda/mma_forward_text.h"

namespace dattn::cuda {

void mma_attend_128(const AttendParams& params, cudaStream_t stream) { launch_mma_forward<128, 128, 2, 32>(params, stream); }

}  // namespace dattn::cuda
