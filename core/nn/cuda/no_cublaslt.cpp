// Matrix products where the build knows no cuBLASLt: the plain kernel.
#include "core/nn/cuda/matmul.h"
#include "core/nn/cuda/ops.h"

namespace dattn::cuda {

void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const CudaMatmul& how, NativeStream stream) {
  plain_matmul(a, b, c, how, stream);
}

std::string matmul_library() { return "plain kernel: built without cuBLASLt's headers"; }

}  // namespace dattn::cuda
