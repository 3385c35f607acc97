// One block of the transformer, forward and backward:
//   x1 = x0 + dropout(leave(attention(enter(norm(x0)))) + bias)
//   x2 = x1 + dropout(leave(mlp(enter(norm(x1)))) + bias)
// Letters as in transformer.h: N token rows, R residual rows, M dim, H and K heads here, D head dim, F hidden units here.
#pragma once

#include "core/nn/hooks.h"
#include "core/nn/linear.h"
#include "core/nn/norm.h"
#include "core/nn/residual.h"

namespace dattn {

struct TransformerBlock {
  Norm attention_norm;
  Linear q, k, v;  // [H D, M], [K D, M], [K D, M]
  Linear out;      // [M, H D]; its bias is out_bias, added in the residual stream
  Parameter* out_bias = nullptr;
  Norm mlp_norm;
  Linear gate, up;  // [F, M]; gate with swiglu only
  Linear down;      // [M, F]
  Parameter* down_bias = nullptr;

  bool gated() const { return gate.weight != nullptr; }
};

// What backward needs of one block's forward.
struct Activations {
  Tensor x0;        // [R, M] fp32
  Tensor stats0;    // [R, 2]
  Tensor h0;        // [N, M] compute type: what attention's linear layers read
  Tensor q, k, v;   // [B, S, H, D], [B, S, K, D] compute type, turned by rope
  Tensor o;         // [B, S, H, D]
  Tensor x1;        // [R, M] fp32
  Tensor stats1;    // [R, 2]
  Tensor h1;        // [N, M] compute type: what the MLP reads
  Tensor gate, up;  // [N, F] compute type, before the activation
};

// One call's surroundings, the same for every block.
struct Pass {
  Pass(Attention& a, Boundary& b) : attention(a), boundary(b) {}

  Attention& attention;
  Boundary& boundary;
  std::int64_t batch = 0;     // B
  std::int64_t seq = 0;       // S
  std::int64_t head_dim = 0;  // D
  DType compute = DType::kF32;
  TokenRows rows;      // of the residual stream
  Dropout dropout;     // without its site
  AttentionSite site;  // without its layer; dropout_stream is that of layer 0
  Tensor rope;         // rope_table, or undefined
  Tensor positions;    // what rows.on_device points to
  bool first = false;  // products write the gradients of weights, not add to them
};

// x [R, M] -> [R, M]. Activations are left in `keep`; Attention holds what it saved for this layer.
Tensor block_forward(const TransformerBlock& block, int layer, const Pass& pass, Tensor x, Activations& keep);

// dx [R, M]: gradient of the block's output on entry, of its input on return. Empties `keep` as it goes; adds to the
// parameters' gradients.
void block_backward(const TransformerBlock& block, int layer, const Pass& pass, Activations& keep, const TensorView& dx);

}  // namespace dattn
