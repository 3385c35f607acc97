// Forward instances for dims up to 64 and 64.
#include "core/attention/cuda/mma_forward_text.h"

namespace dattn::cuda {

void mma_attend_64(const AttendParams& params, cudaStream_t stream) { launch_mma_forward<64, 64, 2, 64>(params, stream); }

}  // namespace dattn::cuda
