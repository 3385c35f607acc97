// Matrix products, by oneDNN. Measured on one core at training shapes (m = 2048, n, k = 192 .. 768, GFLOP/s): oneDNN
// fp32 102-117, OpenBLAS 0.3.21 fp32 93-106, oneDNN bf16 165-226, which OpenBLAS does not have.
#pragma once

#include <string>

#include "core/tensor/tensor.h"

namespace dattn {

struct MatmulOptions {
  const float* bias = nullptr;  // [n], added to every row of c
  bool accumulate = false;      // c += a b instead of c = a b; fp32 c and no bias only
  bool fixed = false;           // the same bits whatever number of threads the rank has: on the calling thread alone; on a
                                // device, without sums that are split over blocks
  const TensorView* before_gelu = nullptr;  // a b + bias goes here, and c is its gelu (activation.h); both contiguous, of one
                                            // type; not with accumulate
};

// c [m, n] = a [m, k] b [k, n]. a and b: both fp32, both bf16 or both fp16, one stride of each is 1 (so transposes cost
// nothing); c: any of these, contiguous rows. Sums in fp32. Any extent may be 0. Callable from several threads at once; uses
// the OpenMP threads of the caller; the same shapes on as many threads give the same bits.
void matmul(const TensorView& a, const TensorView& b, const TensorView& c, const MatmulOptions& options = {});

// The instruction set of products on the CPU, by the name that DNNL_MAX_CPU_ISA gives it; empty where oneDNN tells none.
std::string matmul_instructions();

}  // namespace dattn
