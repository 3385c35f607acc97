#include "core/nn/block.h"

#include <utility>

#include "core/nn/activation.h"
#include "core/nn/rope.h"

namespace dattn {
namespace {

Dropout at_site(const Pass& pass, int layer, int half) {
  Dropout dropout = pass.dropout;
  dropout.site = 1 + 2 * static_cast<std::uint64_t>(layer) + static_cast<std::uint64_t>(half);  // 0 is the embedding
  return dropout;
}

AttentionSite attention_site(const Pass& pass, int layer) {
  AttentionSite site = pass.site;
  site.layer = layer;
  site.dropout_stream += static_cast<std::uint64_t>(layer);
  return site;
}

// [N, heads * D] seen as [B, S, heads, D].
TensorView as_heads(const TensorView& rows, const Pass& pass) {
  return rows.reshape({pass.batch, pass.seq, rows.size(1) / pass.head_dim, pass.head_dim});
}

TensorView as_rows(const TensorView& heads) {
  return heads.reshape({heads.size(0) * heads.size(1), heads.size(2) * heads.size(3)});
}

// x [R, M] -> norm -> [N, M] in the compute type
Tensor enter_half(const Norm& norm, const Pass& pass, const TensorView& x, Tensor& stats) {
  stats = Tensor::uninitialized(DType::kF32, {x.size(0), 2});
  return pass.boundary.enter(norm_forward(norm, x, stats, pass.compute), pass.batch * pass.seq);
}

// dh [N, M] fp32 -> through enter and norm, onto dx [R, M]
void enter_half_backward(const Norm& norm, const Pass& pass, Tensor dh, const TensorView& x, const TensorView& stats,
                         const TensorView& dx) {
  const Tensor dnormed = pass.boundary.enter_backward(std::move(dh), pass.batch * pass.seq);
  norm_backward(norm, x, stats, dnormed, dx, pass.rows.tree);
}

// dx [R, M] -> gradient of the half's row-cut product, [N, M] in the compute type
Tensor leave_half_backward(const Pass& pass, const Dropout& dropout, const TensorView& dx, Parameter* bias) {
  Tensor dy = residual_backward(dropout, pass.rows, dx, bias);
  return to_compute(pass.boundary.leave_backward(std::move(dy), pass.batch * pass.seq), pass.compute);
}

Tensor attention_forward(const TransformerBlock& block, int layer, const Pass& pass, Activations& keep) {
  keep.h0 = enter_half(block.attention_norm, pass, keep.x0, keep.stats0);
  keep.q = linear_forward(block.q, keep.h0, pass.compute, pass.rows.tree);  // [N, H D]
  keep.k = linear_forward(block.k, keep.h0, pass.compute, pass.rows.tree);  // [N, K D]
  keep.v = linear_forward(block.v, keep.h0, pass.compute, pass.rows.tree);
  const TensorView q = as_heads(keep.q, pass), k = as_heads(keep.k, pass), v = as_heads(keep.v, pass);
  if (pass.rope.defined()) {
    rope_apply(q, pass.rope, false);
    rope_apply(k, pass.rope, false);
  }
  keep.o = pass.attention.forward(attention_site(pass, layer), q, k, v);               // [B, S, H, D]
  Tensor y = linear_forward(block.out, as_rows(keep.o), DType::kF32, pass.rows.tree);  // [N, M]
  return pass.boundary.leave(std::move(y), pass.batch * pass.seq);                     // [R, M]
}

void attention_backward(const TransformerBlock& block, int layer, const Pass& pass, Activations& keep, const TensorView& dx) {
  const Tensor dy = leave_half_backward(pass, at_site(pass, layer, 0), dx, block.out_bias);  // [N, M]
  linear_backward_weights(block.out, as_rows(keep.o), dy, pass.rows.tree, !pass.first);
  Tensor dout = Tensor::uninitialized(DType::kF32, as_rows(keep.o).shape);  // [N, H D]
  linear_backward_input(block.out, dy, dout, false, pass.rows.tree);
  keep.o = {};
  dout = to_compute(std::move(dout), pass.compute);

  const TensorView q = as_heads(keep.q, pass), k = as_heads(keep.k, pass), v = as_heads(keep.v, pass);
  Attention::Gradients gradients = pass.attention.backward(attention_site(pass, layer), q, k, v, as_heads(dout, pass));
  for (Tensor* done : {&keep.q, &keep.k, &keep.v}) *done = {};
  if (pass.rope.defined()) {
    rope_apply(gradients.dq, pass.rope, true);
    rope_apply(gradients.dk, pass.rope, true);
  }
  Tensor dh = Tensor::uninitialized(DType::kF32, keep.h0->shape);  // [N, M]
  const auto through = [&](const Linear& linear, Tensor gradient, bool accumulate) {
    const Tensor rounded = to_compute(std::move(gradient), pass.compute);
    linear_backward_weights(linear, keep.h0, as_rows(rounded), pass.rows.tree, !pass.first);
    linear_backward_input(linear, as_rows(rounded), dh, accumulate, pass.rows.tree);
  };
  through(block.q, std::move(gradients.dq), false);
  through(block.k, std::move(gradients.dk), true);
  through(block.v, std::move(gradients.dv), true);
  keep.h0 = {};
  enter_half_backward(block.attention_norm, pass, std::move(dh), keep.x0, keep.stats0, dx);
}

// -> [N, F]
Tensor mlp_hidden(const TransformerBlock& block, const Pass& pass, Activations& keep) {
  if (!block.gated()) return linear_gelu_forward(block.up, keep.h1, pass.compute, keep.up, pass.rows.tree);
  keep.up = linear_forward(block.up, keep.h1, pass.compute, pass.rows.tree);
  keep.gate = linear_forward(block.gate, keep.h1, pass.compute, pass.rows.tree);
  return swiglu_forward(keep.gate, keep.up);
}

Tensor mlp_forward(const TransformerBlock& block, const Pass& pass, Activations& keep) {
  keep.h1 = enter_half(block.mlp_norm, pass, keep.x1, keep.stats1);
  const Tensor a = mlp_hidden(block, pass, keep);
  Tensor y = linear_forward(block.down, a, DType::kF32, pass.rows.tree);  // [N, M]
  return pass.boundary.leave(std::move(y), pass.batch * pass.seq);        // [R, M]
}

void mlp_backward(const TransformerBlock& block, int layer, const Pass& pass, Activations& keep, const TensorView& dx) {
  const Tensor dy = leave_half_backward(pass, at_site(pass, layer, 1), dx, block.down_bias);  // [N, M]
  Tensor da = Tensor::uninitialized(DType::kF32, keep.up->shape);                             // [N, F]
  linear_backward_input(block.down, dy, da, false, pass.rows.tree);
  Tensor dh = Tensor::uninitialized(DType::kF32, keep.h1->shape);  // [N, M]
  if (block.gated()) {
    const SwigluGradients g = swiglu_backward(keep.gate, keep.up, da);
    for (Tensor* done : {&keep.gate, &keep.up, &da}) *done = {};
    linear_backward_weights(block.down, g.a, dy, pass.rows.tree, !pass.first);
    linear_backward_weights(block.up, keep.h1, g.dup, pass.rows.tree, !pass.first);
    linear_backward_weights(block.gate, keep.h1, g.dgate, pass.rows.tree, !pass.first);
    linear_backward_input(block.up, g.dup, dh, false, pass.rows.tree);
    linear_backward_input(block.gate, g.dgate, dh, true, pass.rows.tree);
  } else {
    const GeluGradients g = gelu_backward(keep.up, da);
    for (Tensor* done : {&keep.up, &da}) *done = {};
    linear_backward_weights(block.down, g.a, dy, pass.rows.tree, !pass.first);
    linear_backward_weights(block.up, keep.h1, g.du, pass.rows.tree, !pass.first);
    linear_backward_input(block.up, g.du, dh, false, pass.rows.tree);
  }
  keep.h1 = {};
  enter_half_backward(block.mlp_norm, pass, std::move(dh), keep.x1, keep.stats1, dx);
}

}  // namespace

Tensor block_forward(const TransformerBlock& block, int layer, const Pass& pass, Tensor x, Activations& keep) {
  keep.x0 = std::move(x);
  Tensor y = attention_forward(block, layer, pass, keep);
  keep.x1 = residual_forward(at_site(pass, layer, 0), pass.rows, keep.x0, std::move(y), block.out_bias);
  y = mlp_forward(block, pass, keep);
  return residual_forward(at_site(pass, layer, 1), pass.rows, keep.x1, std::move(y), block.down_bias);
}

void block_backward(const TransformerBlock& block, int layer, const Pass& pass, Activations& keep, const TensorView& dx) {
  mlp_backward(block, layer, pass, keep, dx);
  keep.x1 = {};
  attention_backward(block, layer, pass, keep, dx);
  keep.x0 = {};
}

}  // namespace dattn
