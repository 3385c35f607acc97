// What this processor can do at most, measured: kernels are judged by their share of it.
#pragma once

#include "core/base/dtype.h"

namespace dattn {

// FLOP/s of the multiply-adds that the cpu kernel uses for this storage type (fp32, bf16 or fp16), on all threads of this rank
// at once, with nothing to load or store, for about as long as `seconds`. Throws Error(kBadInput) for another type.
double multiply_add_rate(DType storage, double seconds);
// The best of a few stretches, about 50 ms in all.
double peak_flops(DType storage);

// Bytes per second that all threads of this rank read together from memory that no cache holds (256 MiB): the best of a few
// passes.
double read_bandwidth();

}  // namespace dattn
