// Whether CUDA devices may round the factors of fp32 products, those of layers and of attention, to TF32 (a mantissa of 10
// bits), which tensor cores take. Sums stay in fp32. Of the whole process; not at first.
#pragma once

namespace dattn {

void allow_tf32(bool allowed);
bool tf32_allowed();

}  // namespace dattn
