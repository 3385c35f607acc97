"""Attention by its formula, in the inputs' type; gradients by autograd. What the tests compare with."""
import math

import torch


def visible(seq, keys, mask="full"):
    """[seq, keys] booleans of the masks that the tests use."""
    d = torch.arange(keys)[None, :] - torch.arange(seq)[:, None]
    kind = mask if isinstance(mask, str) else mask["kind"]
    if kind == "full":
        return d == d
    if kind == "causal":
        return d <= 0
    if kind == "window":
        left, right = mask.get("left"), mask.get("right")
        return (d >= (-seq if left is None else -left)) & (d <= (keys if right is None else right))
    if kind == "documents":
        number = torch.bucketize(torch.arange(seq), torch.as_tensor(mask["cu_seqlens"])[1:], right=True)
        same = number[:, None] == number[None, :]
        return same & (d <= 0) if mask.get("within") in ("causal", {"kind": "causal"}) else same
    raise KeyError(kind)


def attention(q, k, v, mask="causal", scale=None, softcap=None, alibi_slopes=None, bias=None, sink=None, keep=None, shown=None):
    """q [B, S, H, D], k [B, T, K, D], v [B, T, K, V] -> out [B, S, H, V], lse [B, H, S]. keep [B, H, S, T]: what dropout left,
    divided by its probability. shown: the mask as booleans. Rows that see nothing give 0."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(group, 1), v.transpose(1, 2).repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seq, keys = scores.shape[-2:]
    if alibi_slopes is not None:
        d = torch.arange(keys)[None, :] - torch.arange(seq)[:, None]
        scores = scores + torch.as_tensor(alibi_slopes, dtype=q.dtype)[:, None, None] * d
    if bias is not None:
        scores = scores + bias
    shown = visible(seq, keys, mask) if shown is None else shown
    scores = scores.masked_fill(~shown, -math.inf)
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[None, :, None])
    weights = torch.exp(scores - lse[..., None].masked_fill(lse[..., None] == -math.inf, 0))
    if keep is not None:
        weights = weights * keep
    return (weights @ v).transpose(1, 2), lse


def inputs(batch=2, seq=37, heads=4, kv_heads=2, dim=16, dim_v=None, keys=None, dtype=torch.float32):
    """q, k, v that require gradients, and dout."""
    keys, dim_v = keys or seq, dim_v or dim
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    q, k, v = make(batch, seq, heads, dim), make(batch, keys, kv_heads, dim), make(batch, keys, kv_heads, dim_v)
    return *(tensor.requires_grad_() for tensor in (q, k, v)), make(batch, seq, heads, dim_v)


def double(*tensors):
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


def close(got, want, tolerance=2e-6, whole=None):
    """Relative error of the whole tensor; whole: what `want` is a part of, where the part may be 0 but for rounding."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), "other elements are finite"
    size = want[finite].norm() if whole is None else whole.detach().double().norm() / math.sqrt(whole.numel()) * math.sqrt(want.numel())
    error = (got[finite] - want[finite]).norm() / size.clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"
