// The non-linear part of the MLP. Backward takes the pre-activations and gives back the activation too (the next layer's
// weight gradient needs it), so that the forward pass need not keep it.
//   gelu    a = 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))         Hendrycks and Gimpel, 2016, as GPT-2 has it
//   swiglu  a = g sigmoid(g) u                                           Shazeer, "GLU variants improve transformer", 2020
#pragma once

#include "core/tensor/tensor.h"

namespace dattn {

// All [N, F], in one type (fp32, bf16 or fp16), but da: fp32.
Tensor gelu_forward(const TensorView& u);
void gelu_forward(const TensorView& u, const TensorView& a);
struct GeluGradients {
  Tensor a, du;
};
GeluGradients gelu_backward(const TensorView& u, const TensorView& da);

Tensor swiglu_forward(const TensorView& gate, const TensorView& up);
struct SwigluGradients {
  Tensor a, dgate, dup;
};
SwigluGradients swiglu_backward(const TensorView& gate, const TensorView& up, const TensorView& da);

}  // namespace dattn
